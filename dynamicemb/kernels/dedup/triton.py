"""Deduplication on the GPU: a sort of 32-bit prefixes by torch, and three passes over what it returns.

A prefix is monotone in (owner, table, mixed key), and no two pairs of owner and table share one. Positions with equal
prefixes are a *run*: nearly always one key and its duplicates. The first pass compares neighbours, the second puts in
order those runs that hold different keys after all, the third numbers the entries and writes them.

All tables are sorted together, also where they arrive one after the other: a step takes as long for one of them as for
all.

Nothing waits for the device: results have the length of the batch, and the number of distinct keys stays in memory.
Nothing is atomic: what a program writes, no other program of the same launch reads or writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.triton_support import aligned, mix, owner_of
from dynamicemb.kernels.views import UniqueKeys

# Eight positions for each of 128 threads. At most 2048: counts of positions have 12 bits below.
_TILE = 1024
# Runs of different keys are walked in steps of this length, and up to that one sorted by comparing each with all.
_CHUNK = 256
_SHORT_RUN = 64
# 512 threads of a multiprocessor. Left alone, ptxas goes for more of them and spills.
_SETTLE_OPTIONS = LaunchOptions(maxnreg=128)

# Rows (int32) of the table of tiles. A run enters a tile that it does not begin in, and leaves one that it does not end
# in; a tile is entered by one run at most.
_BEGUN = tl.constexpr(0)  # entries of the runs that begin in the tile
_AHEAD = tl.constexpr(1)  # entries of the run that enters which begin in the tile or later; none if it is one key
_ENTERED = tl.constexpr(2)  # positions of the run that enters
_STATE = tl.constexpr(3)
_ROWS = 4
# Fields of _STATE, numbers of positions. "Differs": it has another key than the position before in its run.
_ENTERED_RUN_DIFFERS = tl.constexpr(0xFFF)
_BEGUN_RUN_DIFFERS = tl.constexpr(0xFFF000)
_ENTERED_RUN_LEAVES = tl.constexpr(1 << 24)
_BEGUN_RUN_LEAVES = tl.constexpr(1 << 25)
_ONE_ENTERED = tl.constexpr(1)
_ONE_BEGUN = tl.constexpr(1 << 12)


@triton.jit
def _lanes(LENGTH: tl.constexpr):
    """0 to ``LENGTH - 1``, neighbours in neighbouring threads.

    The hint keeps Triton from giving several in a row to a thread. Where a mask may end anywhere, that saves no load,
    and each load of a warp would touch many lines instead of one or two.
    """
    return tl.max_contiguous(tl.arange(0, LENGTH), 1)


@triton.jit
def _mixed_at(keys, order, at, mask):
    return mix(tl.load(keys + tl.load(order + at, mask=mask, other=0), mask=mask, other=0))


@triton.jit(do_not_specialize=["total", "num_tables", "world_size", "share"])
def _prefix_kernel(keys, tables, prefixes, total, num_tables, world_size, share, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + _lanes(TILE)
    inside = at < total
    h = mix(tl.load(keys + at, mask=inside, other=0))
    group = owner_of(h, world_size) * num_tables + tl.load(tables + at, mask=inside, other=0)
    # The low half of h * world_size is the place of the key in its owner's range; here it spreads over the share of all
    # prefixes that a pair of owner and table has.
    place = tl.umulhi(h * world_size.to(tl.uint64), share.to(tl.uint64)).to(tl.int64)
    # torch sorts signed numbers.
    tl.store(prefixes + at, (group * share + place - 2**31).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["total", "num_tiles"])
def _compare_kernel(keys, prefixes, order, heads, tiles, total, num_tiles, TILE: tl.constexpr):
    """Marks where a key differs from the one before, as far as prefixes have put them in order; describes the tile."""
    lanes = _lanes(TILE)
    first = tl.program_id(0) * TILE
    at = first + lanes
    inside = at < total
    position = tl.load(order + at, mask=inside, other=0)
    prefix = tl.load(prefixes + at, mask=inside, other=0)
    joined = inside & (at > 0)
    joined &= prefix == tl.load(prefixes + at - 1, mask=joined, other=0)
    followed = at + 1 < total
    followed &= prefix == tl.load(prefixes + at + 1, mask=followed, other=0)

    # Reading keys is what costs here: each is read once, and only if there is one to compare it with.
    compared = joined | followed
    key = tl.load(keys + position, mask=compared, other=0)
    has_before = first > 0
    key_before = tl.load(keys + tl.load(order + first - 1, mask=has_before, other=0))
    key_before = tl.where(lanes > 0, tl.gather(key, tl.maximum(lanes - 1, 0), axis=0), key_before)
    different = joined & (key != key_before)
    tl.store(heads + at, (different | ~joined).to(tl.int8), mask=inside)

    entered = inside & has_before & (prefix == tl.load(prefixes + first - 1, mask=has_before, other=0))
    state = tl.where(different, tl.where(entered, _ONE_ENTERED, _ONE_BEGUN), 0)
    leaves = followed & (lanes == TILE - 1)
    state += tl.where(leaves, tl.where(entered, _ENTERED_RUN_LEAVES, _BEGUN_RUN_LEAVES), 0)
    tile = tiles + tl.program_id(0)
    tl.store(tile + _BEGUN * num_tiles, tl.sum((inside & ~joined).to(tl.int32), axis=0))
    tl.store(tile + _AHEAD * num_tiles, 0)
    tl.store(tile + _ENTERED * num_tiles, tl.sum(entered.to(tl.int32), axis=0))
    tl.store(tile + _STATE * num_tiles, tl.sum(state, axis=0))


@triton.jit
def _rank_run(keys, order, spare, begin, end, SHORT_RUN: tl.constexpr):
    """Writes the positions of a short run to ``spare``, stably by ``h``."""
    at = begin + _lanes(SHORT_RUN)
    h = _mixed_at(keys, order, at, at < end)
    rank = tl.zeros([SHORT_RUN], tl.int32)
    for other in range(begin, end):
        other_h = _mixed_at(keys, order, other, True)
        rank += ((other_h < h) | ((other_h == h) & (other < at))).to(tl.int32)
    tl.store(spare + begin + rank, tl.load(order + at, mask=at < end, other=0), mask=at < end)


@triton.jit
def _split_run(keys, order, spare, begin, end, bit, CHUNK: tl.constexpr):
    """Writes the positions of a run to ``spare``, stably by one bit of ``h``."""
    clear = 0
    for first in range(begin, end, CHUNK):
        at = first + _lanes(CHUNK)
        is_set = ((_mixed_at(keys, order, at, at < end) >> bit) & 1) != 0
        clear += tl.sum(((at < end) & ~is_set).to(tl.int32), axis=0)
    next_clear = begin
    next_set = begin + clear
    for first in range(begin, end, CHUNK):
        at = first + _lanes(CHUNK)
        is_set = (((_mixed_at(keys, order, at, at < end) >> bit) & 1) != 0) & (at < end)
        is_clear = (at < end) & ~is_set
        to_set = next_set + tl.cumsum(is_set.to(tl.int32), 0) - 1
        to_clear = next_clear + tl.cumsum(is_clear.to(tl.int32), 0) - 1
        position = tl.load(order + at, mask=at < end, other=0)
        tl.store(spare + tl.where(is_set, to_set, to_clear), position, mask=at < end)
        next_set += tl.sum(is_set.to(tl.int32), axis=0)
        next_clear += tl.sum(is_clear.to(tl.int32), axis=0)


@triton.jit
def _highest_difference(keys, order, begin, end, CHUNK: tl.constexpr):
    """The highest bit in which two keys of a run differ in ``h``."""
    reference = _mixed_at(keys, order, begin, True)
    differences = reference ^ reference
    for first in range(begin, end, CHUNK):
        at = first + _lanes(CHUNK)
        h = tl.where(at < end, _mixed_at(keys, order, at, at < end), reference)
        differences = tl.maximum(differences, tl.max(h ^ reference, axis=0))
    return tl.sum(((differences >> tl.arange(0, 64).to(tl.uint64)) != 0).to(tl.uint64), axis=0) - 1


@triton.jit
def _settle_run(keys, order, spare, heads, begin, end, CHUNK: tl.constexpr, SHORT_RUN: tl.constexpr):
    """Sorts a run of different keys and marks its heads; returns its number of entries.

    A long run is a frequent key and, but for rare luck, one other: a split by the highest bit that differs puts them in
    order. Otherwise it is split by every bit from the lowest up to that one. So whatever keys were chosen to collide,
    nothing is read more than 200 times; but one program does it all.
    """
    bit = tl.full([], 0, tl.uint64)
    next_bit = tl.full([], 0, tl.uint64)
    if end - begin > SHORT_RUN:
        bit = _highest_difference(keys, order, begin, end, CHUNK)
    entries = 0
    descents = 1
    while descents > 0:
        if end - begin > SHORT_RUN:
            _split_run(keys, order, spare, begin, end, bit, CHUNK)
        else:
            _rank_run(keys, order, spare, begin, end, SHORT_RUN)
        bit = next_bit
        next_bit += 1
        tl.debug_barrier()  # other threads read what these have written; once more below
        entries = 0
        descents = 0
        for first in range(begin, end, CHUNK):
            at = first + _lanes(CHUNK)
            inside = at < end
            joined = inside & (at > begin)
            h = _mixed_at(keys, spare, at, inside)
            h_before = _mixed_at(keys, spare, at - 1, joined)
            head = inside & ~(joined & (h == h_before))
            tl.store(order + at, tl.load(spare + at, mask=inside, other=0), mask=inside)
            tl.store(heads + at, head.to(tl.int8), mask=inside)
            entries += tl.sum(head.to(tl.int32), axis=0)
            descents += tl.sum((joined & (h < h_before)).to(tl.int32), axis=0)
        tl.debug_barrier()
    return entries


@triton.jit(do_not_specialize=["total", "num_tiles"])
def _settle_kernel(
    keys, prefixes, order, spare, heads, tiles, total, num_tiles, TILE: tl.constexpr, CHUNK: tl.constexpr,
    SHORT_RUN: tl.constexpr,
):  # fmt: skip
    """Puts the runs that begin in a tile and hold different keys in order. Most often there is none."""
    lanes = _lanes(TILE)
    tile = tl.program_id(0)
    states = tiles + _STATE * num_tiles
    state = tl.load(states + tile)
    state_after = tl.load(states + tile + 1, mask=tile + 1 < num_tiles, other=0)
    leaves = (state & _BEGUN_RUN_LEAVES) != 0
    further = tl.where(leaves, state_after & (_ENTERED_RUN_DIFFERS | _ENTERED_RUN_LEAVES), 0)
    if (state & _BEGUN_RUN_DIFFERS) + further == 0:
        return

    # The last tile of the run that leaves this one, and whether it differs in later tiles.
    last = tile
    differs_later = 0
    while leaves:
        after = last + 1 + lanes
        states_after = tl.load(states + after, mask=after < num_tiles, other=0)
        last = tl.min(tl.where((states_after & _ENTERED_RUN_LEAVES) == 0, after, last + TILE), axis=0)
        differs_later |= tl.max(tl.where(after <= last, states_after & _ENTERED_RUN_DIFFERS, 0), axis=0)
        leaves = tl.min(states_after & _ENTERED_RUN_LEAVES, axis=0) != 0

    entries = tl.load(tiles + _BEGUN * num_tiles + tile)
    first = tile * TILE
    end = first + tl.load(tiles + _ENTERED * num_tiles + tile)
    found = first
    while found < total:
        # From where the last run ended on, the next position that differs; the last one of the tile stands for those of
        # later tiles.
        at = first + lanes
        inside = at < total
        joined = inside & (at > end)
        prefix = tl.load(prefixes + at, mask=inside, other=0)
        joined &= prefix == tl.load(prefixes + at - 1, mask=joined, other=0)
        differs = joined & (tl.load(heads + at, mask=joined, other=0) != 0)
        differs |= (lanes == TILE - 1) & (at >= end) & (differs_later != 0)
        found = tl.min(tl.where(differs, at, total), axis=0)
        if found < total:
            member = inside & (prefix == tl.load(prefixes + found))
            begin = tl.min(tl.where(member, at, total), axis=0)
            end = begin + tl.sum(member.to(tl.int32), axis=0)
            if (end == first + TILE) & (last > tile):
                end = last * TILE + tl.load(tiles + _ENTERED * num_tiles + last)
            ahead = _settle_run(keys, order, spare, heads, begin, end, CHUNK, SHORT_RUN)
            entries += ahead - 1
            for number in range(tile, (end - 1) // TILE):
                here = number * TILE + lanes
                ahead -= tl.sum(tl.load(heads + here, mask=here >= begin, other=0).to(tl.int32), axis=0)
                tl.store(tiles + _AHEAD * num_tiles + number + 1, ahead)
    tl.store(tiles + _BEGUN * num_tiles + tile, entries)


@triton.jit(do_not_specialize=["total", "num_tiles"])
def _number_kernel(
    keys, tables, order, heads, tiles, unique_keys, unique_tables, inverse, offsets, count, total, num_tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """Numbers the entries and writes them, and what has to follow the last one."""
    lanes = _lanes(TILE)
    tile = tl.program_id(0)
    at = tile * TILE + lanes
    inside = at < total
    position = tl.load(order + at, mask=inside, other=0)
    head = tl.load(heads + at, mask=inside, other=0) != 0
    key = tl.load(keys + position, mask=head, other=0)
    table = tl.load(tables + position, mask=head, other=0)

    # Each program adds up all tiles. Up to a million keys this is one load of 4 KB, less than a launch that does it for
    # all; for ten million it is 0.4 GB from the cache.
    next_entry = -tl.load(tiles + _AHEAD * num_tiles + tile)
    entries = 0
    for first in range(0, num_tiles, TILE):
        number = first + lanes
        begun = tl.load(tiles + _BEGUN * num_tiles + number, mask=number < num_tiles, other=0)
        next_entry += tl.sum(tl.where(number < tile, begun, 0), axis=0)
        entries += tl.sum(begun, axis=0)

    entry = next_entry + tl.cumsum(head.to(tl.int32), 0) - 1
    tl.store(inverse + position, entry, mask=inside)
    tl.store(unique_keys + entry, key, mask=head)
    tl.store(unique_tables + entry, table, mask=head)
    tl.store(offsets + entry, at, mask=head)
    unused = inside & (at >= entries)
    tl.store(unique_tables + at, tl.zeros([TILE], tl.int32), mask=unused)
    tl.store(offsets + at, total + tl.zeros([TILE], tl.int32), mask=unused)
    if tile == 0:
        tl.store(offsets + total, total)
        tl.store(count, entries)


def _sorted_prefixes(
    keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [N] and int64 [N]: the prefixes in ascending order, equal ones in batch order, and their positions."""
    prefixes = torch.empty(keys.shape, dtype=torch.int32, device=keys.device)
    share = 2**32 // (num_tables * world_size)
    launch(
        _prefix_kernel, triton.cdiv(keys.numel(), _TILE), keys, tables, prefixes, keys.numel(), num_tables, world_size,
        share, TILE=_TILE,
    )  # fmt: skip
    ascending = torch.sort(prefixes, stable=True)
    return ascending.values, ascending.indices


def dedup(
    keys: torch.Tensor,
    tables: torch.Tensor,
    num_tables: int,
    world_size: int,
    lengths_by_table: Optional[Sequence[Sequence[int]]],
) -> UniqueKeys:
    keys, tables = aligned(keys), aligned(tables)
    n, device = keys.numel(), keys.device
    unique_keys, unique_tables, inverse = torch.empty_like(keys), torch.empty_like(tables), torch.empty_like(keys)
    if n == 0:
        offsets, count = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        return UniqueKeys(unique_keys, unique_tables, inverse, torch.empty_like(keys), offsets, count)
    offsets, count = (torch.empty(size, dtype=torch.int64, device=device) for size in (n + 1, 1))
    prefixes, order = _sorted_prefixes(keys, tables, num_tables, world_size)
    programs = triton.cdiv(n, _TILE)
    heads = torch.empty(n, dtype=torch.int8, device=device)
    tiles = torch.empty(_ROWS, programs, dtype=torch.int32, device=device)
    launch(_compare_kernel, programs, keys, prefixes, order, heads, tiles, n, programs, TILE=_TILE)
    # The inverse is written after this, so until then its memory can hold positions.
    launch(
        _settle_kernel, programs, keys, prefixes, order, inverse, heads, tiles, n, programs, TILE=_TILE, CHUNK=_CHUNK,
        SHORT_RUN=_SHORT_RUN, options=_SETTLE_OPTIONS,
    )  # fmt: skip
    launch(
        _number_kernel, programs, keys, tables, order, heads, tiles, unique_keys, unique_tables, inverse, offsets,
        count, n, programs, TILE=_TILE,
    )  # fmt: skip
    return UniqueKeys(unique_keys, unique_tables, inverse, order, offsets, count)
