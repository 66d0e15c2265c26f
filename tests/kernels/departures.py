"""What goes to each rank, counted with dictionaries, for the tests of both engines."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.outgoing import count_runs, with_occurrences
from dynamicemb.kernels.views import UniqueKeys
from tests import oracle
from tests.kernels.keys import EXTREME_KEYS

__all__ = ["BATCHES", "assert_counted"]

#: Keys of a batch, of which tables (the number of tables is one more than the highest), by how many distinct ones.
BATCHES: dict[str, tuple[int, list[int], int]] = {
    "none": (0, [0], 1),
    "one key": (1, [0], 1),
    "one key many times": (700, [0], 1),
    "the last table alone": (50, [3], 40),
    "the first table of several": (50, [0, 0, 5], 40),
    "fewer than lanes": (127, [0, 1], 100),
    "as many as lanes": (128, [0], 10**9),
    "one more": (129, [0], 10**9),
    "a second round and a key": (128 * 128 + 1, [0, 1, 2], 10**9),
    "several rounds": (20_000, [0, 2, 7, 25], 10**9),
}


def with_unused_places(unique: UniqueKeys, batch: int) -> UniqueKeys:
    """As long as the batch, which the Triton engine returns: past the count, keys are whatever was in memory."""
    device, unused = unique.keys.device, batch - unique.keys.numel()
    garbage = torch.randint(-(2**63), 2**63 - 1, (unused,), generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(
        unique,
        keys=torch.cat([unique.keys, garbage.to(device)]),
        tables=torch.cat([unique.tables, torch.zeros(unused, dtype=torch.int32, device=device)]),
        offsets=torch.cat([unique.offsets, torch.full((unused,), batch, device=device)]),
    )


def assert_counted(name: str, world_size: int, device: str) -> None:
    size, used, distinct = BATCHES[name]
    num_tables = max(used) + 1
    generator = torch.Generator().manual_seed(size + world_size)
    keys = torch.randint(0, distinct, (size,), generator=generator) * 0x9E3779B97F4A7C1  # wraps: all 64 bits
    keys[: len(EXTREME_KEYS) // 2] = torch.tensor(EXTREME_KEYS[: min(size, len(EXTREME_KEYS) // 2)], dtype=torch.int64)
    tables = torch.tensor(used, dtype=torch.int32)[torch.randint(0, len(used), (size,), generator=generator)]
    occurrences = Counter(zip(keys.tolist(), tables.tolist()))
    expected = Counter((oracle.owner(key, world_size), table) for key, table in occurrences)

    unique = dedup(keys.to(device), tables.to(device), num_tables, world_size)
    runs = [(rank, table) for rank in range(world_size) for table in range(num_tables)]
    narrowed = unique.narrowed(int(unique.count))
    padded = with_unused_places(narrowed, size)
    for given in (narrowed, padded):
        counts = torch.full((world_size, num_tables), -7, dtype=torch.int64, device=device)
        count_runs(given, counts)
        assert counts.flatten().tolist() == [expected[run] for run in runs]

        pairs = with_occurrences(given)
        assert pairs.dtype is torch.int64 and pairs.shape == (given.keys.numel(), 2)
        assert pairs[: len(occurrences)].tolist() == [
            [key, occurrences[key, table]] for key, table in zip(narrowed.keys.tolist(), narrowed.tables.tolist())
        ]
