"""Tallies on the CPU: one walk over a byte for each key, on one thread."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.numba_support import kernel
from dynamicemb.kernels.tally import TALLY_TILE
from dynamicemb.kernels.views import EvictionView, KeyStatus, UniqueKeys

_REPLACED = np.int8(KeyStatus.REPLACED)
_TILE = np.int64(TALLY_TILE)


@kernel
def _tally(tables, status, outcomes, clock):
    for entry in range(status.size):
        outcomes[tables[entry], status[entry]] += 1
    for table in range(clock.size):
        clock[table] += 1


@kernel
def _count_evictions(status, evicted, tick, count):
    for entry in range(status.size):
        if status[entry] == _REPLACED:
            evicted[entry // _TILE] += 1
            count[0] += 1
    tick[0] += 1


def tally(
    unique: UniqueKeys,
    status: torch.Tensor,
    outcomes: torch.Tensor,
    clock: torch.Tensor,
    log: Optional[EvictionView],
) -> Optional[torch.Tensor]:
    _tally(unique.tables.numpy(), status.numpy(), outcomes.numpy(), clock.numpy())
    if log is None:
        return None
    evicted = torch.zeros(-(-status.numel() // TALLY_TILE), dtype=torch.int32)
    _count_evictions(status.numpy(), evicted.numpy(), log.tick.numpy(), log.count.numpy())
    return evicted
