"""Notes of changes on the Triton engine: entry by entry those of a list, whatever the number of programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.notes import Notes
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _triton_engine() -> Iterator[None]:
    with engine("triton"):
        yield


@pytest.mark.parametrize("touches", [False, True])
@pytest.mark.parametrize("ring", [1, 30, 100])
def test_short_batches(ring: int, touches: bool) -> None:
    notes = Notes(ring, ring, touches, DEVICE)
    for size, evicting in ((0, 0.0), (20, 0.3), (1, 1.0), (60, 1.0), (0, 0.0), (40, 0.0), (50, 0.5)):
        lookup = notes.look_up(size, evicting)
        if touches:
            notes.touch_late(lookup)


@pytest.mark.parametrize("ring", [1, 700, 3000])
@pytest.mark.parametrize("evicting", [0.001, 0.5, 1.0])
def test_batches_of_several_programs(ring: int, evicting: float) -> None:
    notes = Notes(ring, ring, True, DEVICE)
    for size in (2100, 1023, 1024):
        notes.touch_late(notes.look_up(size, evicting))
