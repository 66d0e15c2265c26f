"""Notes of changes on the GPU, in the order of the batch without an atomic operation.

The tally before has counted the evictions of each tile, so a program adds up those of the tiles before its own, and
knows its places in the ring: with a million keys this is a load of 4 KB, in the few programs that have any eviction.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.layout import CHUNK_SHIFT
from dynamicemb.kernels.tally import TALLY_TILE
from dynamicemb.kernels.views import EvictionView, KeyStatus, TouchView, UniqueKeys

_REPLACED = tl.constexpr(int(KeyStatus.REPLACED))
_CHUNK_SHIFT = tl.constexpr(CHUNK_SHIFT)
_OFFSET_MASK = tl.constexpr((1 << CHUNK_SHIFT) - 1)
# Four keys for each thread: eight would take 96 registers.
_OPTIONS = LaunchOptions(num_warps=8)


@triton.jit
def _touch(entry, inside, slots, touches, bases, now):
    slot = tl.load(slots + entry, mask=inside, other=-1)
    there = slot >= 0
    base = tl.load(bases + (slot >> _CHUNK_SHIFT), mask=there, other=0)
    tl.store(touches + base + (slot & _OFFSET_MASK), now, mask=there)


@triton.jit(do_not_specialize=["size", "num_tiles"])
def _note_kernel(
    count, tables, slots, status, evicted_keys, evicted, tick, evictions, ring_keys, ring_tables, ring_ticks, touches,
    bases, size, num_tiles, TILE: tl.constexpr, TOUCHES: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE
    if first >= entries:
        return
    lanes = tl.arange(0, TILE)
    entry = first + lanes
    inside = entry < entries
    now = tl.load(tick).to(tl.int32) + tl.zeros([TILE], tl.int32)
    if TOUCHES:
        _touch(entry, inside, slots, touches, bases, now)
    if tl.load(evicted + tile) > 0:
        before, total = 0, 0
        for begin in range(0, num_tiles, TILE):
            of_tile = begin + lanes
            numbers = tl.load(evicted + of_tile, mask=of_tile < num_tiles, other=0)
            before += tl.sum(tl.where(of_tile < tile, numbers, 0), axis=0)
            total += tl.sum(numbers, axis=0)
        gave_way = inside & (tl.load(status + entry, mask=inside, other=-1) == _REPLACED)
        number = before + tl.cumsum(gave_way.to(tl.int32), 0) - 1
        # Those that would be written over at once are left out; the others take less than a turn of the ring. So one
        # division serves all of them.
        skipped = tl.maximum(total - size, 0)
        begin = ((tl.load(evictions) - total + skipped) % size).to(tl.int32)
        kept = gave_way & (number >= skipped)
        place = begin + number - skipped
        place = tl.where(place >= size, place - size, place)
        tl.store(ring_keys + place, tl.load(evicted_keys + entry, mask=kept, other=0), mask=kept)
        tl.store(ring_tables + place, tl.load(tables + entry, mask=kept, other=0), mask=kept)
        tl.store(ring_ticks + place, now, mask=kept)


@triton.jit
def _note_touches_kernel(count, slots, tick, touches, bases, TILE: tl.constexpr):
    entries = tl.load(count)
    first = tl.program_id(0).to(tl.int64) * TILE
    if first >= entries:
        return
    entry = first + tl.arange(0, TILE)
    now = tl.load(tick).to(tl.int32) + tl.zeros([TILE], tl.int32)
    _touch(entry, entry < entries, slots, touches, bases, now)


def note(
    unique: UniqueKeys,
    slots: torch.Tensor,
    insertion: Insertion,
    evicted: torch.Tensor,
    log: EvictionView,
    touches: Optional[TouchView],
) -> None:
    ticks, bases = (log.ticks, log.keys) if touches is None else (touches.ticks, touches.bases)
    launch(
        _note_kernel, evicted.numel(), unique.count, unique.tables, slots, insertion.status, insertion.evicted_keys,
        evicted, log.tick, log.count, log.keys, log.tables, log.ticks, ticks, bases, log.keys.numel(), evicted.numel(),
        TILE=TALLY_TILE, TOUCHES=touches is not None, options=_OPTIONS,
    )  # fmt: skip


def note_touches(unique: UniqueKeys, slots: torch.Tensor, tick: torch.Tensor, touches: TouchView) -> None:
    launch(
        _note_touches_kernel, triton.cdiv(slots.numel(), TALLY_TILE), unique.count, slots, tick, touches.ticks,
        touches.bases, TILE=TALLY_TILE,
    )  # fmt: skip
