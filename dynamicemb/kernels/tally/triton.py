"""Tallies on the GPU: keys are in the order of their tables, so a program meets one table, rarely two or more.

The additions to the counters are atomic. They are whole numbers, so their order changes nothing; and a program adds at
most four of them for each table that it meets, so few ever wait for each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import launch
from dynamicemb.kernels.views import KeyStatus, UniqueKeys

_TILE = 1024
_KINDS = tl.constexpr(len(KeyStatus))


@triton.jit
def _tally_kernel(count, tables, status, outcomes, TILE: tl.constexpr):
    entries = tl.load(count)
    first = tl.program_id(0).to(tl.int64) * TILE
    if first >= entries:
        return
    entry = first + tl.arange(0, TILE)
    inside = entry < entries
    outcome = tl.load(status + entry, mask=inside, other=-1).to(tl.int32)
    table_of_entry = tl.load(tables + entry, mask=inside, other=-1)
    table = tl.load(tables + first)
    last = tl.load(tables + tl.minimum(first + TILE, entries) - 1)
    while table <= last:
        here = table_of_entry == table
        for kind in tl.static_range(_KINDS):
            total = tl.sum((here & (outcome == kind)).to(tl.int32), axis=0)
            if total > 0:
                tl.atomic_add(outcomes + table * _KINDS + kind, total.to(tl.int64), sem="relaxed")
        table += 1


def tally(unique: UniqueKeys, status: torch.Tensor, outcomes: torch.Tensor) -> None:
    launch(_tally_kernel, triton.cdiv(status.numel(), _TILE), unique.count, unique.tables, status, outcomes, TILE=_TILE)
