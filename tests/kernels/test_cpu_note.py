"""Notes of changes on the CPU engine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exploring import examples
from tests.kernels.notes import Notes

LOOKUPS = st.lists(st.tuples(st.sampled_from((0, 1, 5, 40)), st.sampled_from((0.0, 0.1, 1.0))), max_size=8)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 90), st.booleans(), LOOKUPS)
def test_any_lookups(seed: int, ring: int, touches: bool, lookups: list[tuple[int, float]]) -> None:
    """Rings that hold less than a batch evicts, and more than all of them do."""
    notes = Notes(seed, ring, touches, "cpu")
    before = [notes.look_up(size, evicting) for size, evicting in lookups]
    if touches:
        for lookup in before[::2]:
            notes.touch_late(lookup)


@pytest.mark.parametrize("ring", [1, 700, 1024, 3000, 20_000])
@pytest.mark.parametrize("evicting", [0.001, 0.5, 1.0])
def test_long_batches_in_two_threads(ring: int, evicting: float, two_threads: None) -> None:
    """More keys than are counted together, and than one thread takes."""
    notes = Notes(ring, ring, True, "cpu")
    for size in (5000, 1023, 4097):
        notes.touch_late(notes.look_up(size, evicting))
