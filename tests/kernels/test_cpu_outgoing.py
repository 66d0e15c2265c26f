"""What goes to each rank, on the CPU engine."""

from __future__ import annotations

import pytest

from tests.kernels.departures import BATCHES, assert_counted


@pytest.mark.parametrize("world_size", [1, 2, 7])
@pytest.mark.parametrize("name", BATCHES)
def test_keys_of_each_run_and_their_occurrences(name: str, world_size: int) -> None:
    assert_counted(name, world_size, "cpu")
