"""Tallies on the CPU: one walk over a byte for each key, on one thread."""

from __future__ import annotations

import torch

from dynamicemb.kernels.numba_support import kernel
from dynamicemb.kernels.views import UniqueKeys


@kernel
def _tally(tables, status, outcomes, clock):
    for entry in range(status.size):
        outcomes[tables[entry], status[entry]] += 1
    for table in range(clock.size):
        clock[table] += 1


def tally(unique: UniqueKeys, status: torch.Tensor, outcomes: torch.Tensor, clock: torch.Tensor) -> None:
    _tally(unique.tables.numpy(), status.numpy(), outcomes.numpy(), clock.numpy())
