"""Runs of equal numbers on the Triton engine."""

from __future__ import annotations

import pytest

from tests.kernels.runs import LENGTHS, assert_repeated
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


@pytest.mark.parametrize("name", LENGTHS)
def test_each_value_as_often_as_its_length_says(name: str) -> None:
    with engine("triton"):
        assert_repeated(LENGTHS[name], DEVICE)
