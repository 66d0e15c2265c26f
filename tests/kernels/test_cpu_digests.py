"""The search of a digest line, against one that looks at one slot after the other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dynamicemb.kernels.digests_cpu import first_match
from dynamicemb.kernels.numba_support import kernel
from dynamicemb.options import BUCKET_CAPACITIES


@kernel
def _first_matches(line, digest, capacity, found):  # type: ignore[no-untyped-def]
    for slot in range(found.size):
        found[slot] = first_match(line, digest, slot, capacity)


@pytest.mark.parametrize("capacity", BUCKET_CAPACITIES)
def test_finds_the_first_slot_from_each_slot_on(capacity: int) -> None:
    draw = random.Random(capacity)
    for values in (2, 3, 256):
        for _ in range(20):
            # Neighbours hold the digest too: what lies beside the line does not count.
            memory = np.full(3 * capacity, 1, np.uint8)
            line = memory[capacity : 2 * capacity]
            line[:] = [draw.randrange(values) for _ in range(capacity)]
            found = np.empty(capacity + 1, np.int64)
            _first_matches(np.int64(line.ctypes.data), np.uint8(1), np.int64(capacity), found)
            for first in range(capacity + 1):
                expected = next((slot for slot in range(first, capacity) if line[slot] == 1), -1)
                assert found[first] == expected
