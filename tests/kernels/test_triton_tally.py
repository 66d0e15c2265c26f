"""Tallies of outcomes on the Triton engine."""

from __future__ import annotations

import pytest

from tests.kernels.tallies import assert_tallied
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


@pytest.mark.parametrize("tables", [1, 3, 26])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 2100])
def test_every_key_counts_once(size: int, tables: int) -> None:
    with engine("triton"):
        assert_tallied(size, tables, DEVICE)


def test_more_clocks_than_are_advanced_together() -> None:
    with engine("triton"):
        assert_tallied(1, 1025, DEVICE)
