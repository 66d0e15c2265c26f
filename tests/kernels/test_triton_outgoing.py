"""What goes to each rank, on the Triton engine."""

from __future__ import annotations

import pytest

from tests.kernels.departures import BATCHES, assert_counted
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


@pytest.mark.parametrize("world_size", [1, 2, 7])
@pytest.mark.parametrize("name", BATCHES)
def test_keys_of_each_run_and_their_occurrences(name: str, world_size: int) -> None:
    with engine("triton"):
        assert_counted(name, world_size, DEVICE)
