"""Tallies on the GPU: keys are in the order of their tables, so a program meets one table, rarely two or more.

The additions to the counters are atomic. They are whole numbers, so their order changes nothing; and a program adds at
most four of them for each table that it meets, so few ever wait for each other. The first program, which there is for
an empty batch too, advances the clocks.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import launch
from dynamicemb.kernels.tally import TALLY_TILE
from dynamicemb.kernels.views import EvictionView, KeyStatus, UniqueKeys

_KINDS = tl.constexpr(len(KeyStatus))
_REPLACED = tl.constexpr(int(KeyStatus.REPLACED))


@triton.jit(do_not_specialize=["num_tables"])
def _tally_kernel(
    count, tables, status, outcomes, clock, evicted, tick, evictions, num_tables, TILE: tl.constexpr,
    NOTED: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    first = tl.program_id(0).to(tl.int64) * TILE
    if first == 0:
        for begin in range(0, num_tables, TILE):
            of_table = begin + tl.arange(0, TILE)
            clocks = tl.load(clock + of_table, mask=of_table < num_tables, other=0)
            tl.store(clock + of_table, clocks + 1, mask=of_table < num_tables)
        if NOTED:
            tl.atomic_add(tick, 1, sem="relaxed")
    if first >= entries:
        if NOTED:
            tl.store(evicted + tl.program_id(0), 0)
        return
    entry = first + tl.arange(0, TILE)
    inside = entry < entries
    outcome = tl.load(status + entry, mask=inside, other=-1).to(tl.int32)
    if NOTED:
        number = tl.sum((outcome == _REPLACED).to(tl.int32), axis=0)
        tl.store(evicted + tl.program_id(0), number)
        if number > 0:
            tl.atomic_add(evictions, number.to(tl.int64), sem="relaxed")
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


def tally(
    unique: UniqueKeys,
    status: torch.Tensor,
    outcomes: torch.Tensor,
    clock: torch.Tensor,
    log: Optional[EvictionView],
) -> Optional[torch.Tensor]:
    tiles = triton.cdiv(status.numel(), TALLY_TILE)
    evicted, tick, evictions = clock, clock, clock  # stand for what there is not
    if log is not None:
        # One more than there are tiles in an empty batch, for the program that advances the clocks.
        evicted = torch.empty(max(1, tiles), dtype=torch.int32, device=status.device)
        tick, evictions = log.tick, log.count
    launch(
        _tally_kernel, max(1, tiles), unique.count, unique.tables, status, outcomes, clock, evicted, tick, evictions,
        clock.numel(), TILE=TALLY_TILE, NOTED=log is not None,
    )  # fmt: skip
    return None if log is None else evicted[:tiles]
