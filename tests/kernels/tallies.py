"""What tallies must be, counted with a dictionary, for the tests of both engines."""

from __future__ import annotations

from collections import Counter

import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.tally import tally
from dynamicemb.kernels.views import KeyStatus

__all__ = ["assert_tallied"]


def assert_tallied(size: int, tables: int, device: str) -> None:
    """Two batches of about ``size`` distinct keys, most of them in the last table; clocks advance."""
    generator = torch.Generator().manual_seed(size)
    outcomes = torch.zeros(tables, len(KeyStatus), dtype=torch.int64, device=device)
    clock = torch.arange(-1, tables - 1, device=device)
    expected: Counter[tuple[int, int]] = Counter()
    for _ in range(2):
        keys = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)
        indices = torch.randint(0, 2 * tables, (size,), generator=generator, dtype=torch.int32).clamp(max=tables - 1)
        repeated = torch.cat([keys, keys[: size // 3]]), torch.cat([indices, indices[: size // 3]])
        unique = dedup(repeated[0].to(device), repeated[1].to(device), tables, 1)
        count = int(unique.count)
        # Whatever an engine leaves past the last distinct key must not count.
        status = torch.full((unique.keys.numel(),), KeyStatus.INSERTED, dtype=torch.int8)
        status[:count] = torch.randint(0, len(KeyStatus), (count,), generator=generator, dtype=torch.int8)
        tally(unique, status.to(device), outcomes, clock)
        expected.update(zip(unique.tables[:count].tolist(), status[:count].tolist(), strict=True))
    got = {(table, kind): n for table, row in enumerate(outcomes.tolist()) for kind, n in enumerate(row) if n}
    assert got == dict(expected)
    assert clock.tolist() == list(range(1, tables + 1))
