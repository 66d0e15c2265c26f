"""Runs of equal numbers on the CPU engine."""

from __future__ import annotations

import pytest

from tests.kernels.runs import LENGTHS, assert_repeated


@pytest.mark.parametrize("name", LENGTHS)
def test_each_value_as_often_as_its_length_says(name: str) -> None:
    assert_repeated(LENGTHS[name], "cpu")
