"""Tallies of outcomes on the CPU engine."""

from __future__ import annotations

import pytest

from tests.kernels.tallies import assert_tallied


@pytest.mark.parametrize("tables", [1, 3, 26])
@pytest.mark.parametrize("size", [0, 1, 1024, 3000])
def test_every_key_counts_once(size: int, tables: int) -> None:
    assert_tallied(size, tables, "cpu")
