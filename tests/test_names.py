"""Natural order, and lists that stay short."""

from __future__ import annotations

import random

import pytest

from dynamicemb.names import listed, natural_order


@pytest.mark.parametrize(
    "names",
    [
        [f"c{number}" for number in range(1, 27)],
        ["", "0", "1", "a", "a.2.10", "a.10.2", "b"],
        ["c01", "c1", "c1_b", "c1a", "c02", "c2", "c10"],
        ["f1.5", "f1.weight", "f12", "f-2", "f-10"],
        ["x" + "9" * 4999, "x1" + "0" * 4999],
        ["table 9", "table 10", "äpfel2", "äpfel10", "٣"],
    ],
)
def test_numbers_in_names_count_as_numbers(names: list[str]) -> None:
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural_order) == names


def test_lists_of_names_stay_short() -> None:
    names = [f"c{number}" for number in range(1, 301)]
    assert listed(names[:12]) == "c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12"
    assert listed(names) == "c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 and 289 more"
    assert listed([]) == ""
    assert listed(names, 2) == "c1 and 299 more"
