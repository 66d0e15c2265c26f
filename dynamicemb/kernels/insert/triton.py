"""Insertion and eviction on the GPU. The keys of a bucket are neighbours in the batch; one program owns all of them.

A program of one warp looks at 32 neighbouring keys and serves the buckets whose first key is among them, one bucket
after the other. A bucket without misses costs one look at its keys' slots; each miss costs three reductions over the
bucket's slots, held in registers. Nothing here is atomic: no other program reads or writes the same bucket.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.triton_support import (
    aligned,
    bucket_slot,
    digest_of,
    key_pointers,
    line_pointers,
    mix,
    score_pointers,
)
from dynamicemb.kernels.views import GroupView, KeyStatus, UniqueKeys

_FOUND = tl.constexpr(int(KeyStatus.FOUND))
_INSERTED = tl.constexpr(int(KeyStatus.INSERTED))
_REPLACED = tl.constexpr(int(KeyStatus.REPLACED))
_REFUSED = tl.constexpr(int(KeyStatus.REFUSED))
_GREATEST_SCORE = tl.constexpr(2**63 - 1)

# One warp: reductions stay in it, and what it reads it wrote itself.
_TILE = 32
_OPTIONS = LaunchOptions(num_warps=1)


@triton.jit
def _buckets_of(keys, tables, geometry, entry, inside, world_size, CAPACITY: tl.constexpr):
    """Handle of the first slot of each entry's bucket, −1 outside."""
    mixed = mix(tl.load(keys + entry, mask=inside, other=0))
    table = tl.load(tables + entry, mask=inside, other=0)
    return tl.where(inside, bucket_slot(geometry, mixed, table, world_size, inside, CAPACITY), -1)


@triton.jit(do_not_specialize=["chunks", "world_size"])
def _insert_kernel(
    addresses, geometry, count, keys, tables, scores, slots, status, evicted_keys, evicted_scores, chunks, world_size,
    CAPACITY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    tile_first = tl.program_id(0).to(tl.int64) * TILE
    if tile_first >= entries:
        return
    lanes = tl.arange(0, TILE)
    places = tl.arange(0, CAPACITY)
    entry = tile_first + lanes
    buckets = _buckets_of(keys, tables, geometry, entry, entry < entries, world_size, CAPACITY)
    before = _buckets_of(keys, tables, geometry, entry - 1, (entry > 0) & (entry <= entries), world_size, CAPACITY)
    heads = (entry < entries) & (buckets != before)
    head = tl.min(tl.where(heads, lanes, TILE), axis=0)
    while head < TILE:
        bucket = tl.max(tl.where(lanes == head, buckets, -1), axis=0)
        begin = tile_first + head

        # The bucket's keys end where another bucket begins. Those that were found keep their slots.
        touched = tl.zeros([CAPACITY], tl.int32)
        misses = 0
        end = begin
        members = TILE
        while members == TILE:
            entry = end + lanes
            inside = entry < entries
            inside &= _buckets_of(keys, tables, geometry, entry, inside, world_size, CAPACITY) == bucket
            slot = tl.load(slots + entry, mask=inside, other=-1)
            found = slot >= 0
            tl.store(status + entry, tl.full([TILE], _FOUND, tl.int8), mask=found)
            place = tl.where(found, (slot & (CAPACITY - 1)).to(tl.int32), -1)
            touched |= tl.max((place[:, None] == places[None, :]).to(tl.int32), axis=0)
            members = tl.sum(inside.to(tl.int32), axis=0)
            misses += members - tl.sum(found.to(tl.int32), axis=0)
            end += members

        if misses > 0:
            digest_line = line_pointers(addresses, chunks, bucket, True, CAPACITY)
            key_line = key_pointers(addresses, chunks, bucket, True)
            score_line = score_pointers(addresses, chunks, bucket, True)
            stored_scores = tl.load(score_line + places)
            empty = (tl.load(digest_line + places) == 0).to(tl.int32)
            evictable = (1 - empty) * (1 - touched)
            room = tl.sum(empty + evictable, axis=0)
            window = begin
            while misses > 0:
                entry = window + lanes
                missing = (entry < end) & (tl.load(slots + entry, mask=entry < end, other=0) < 0)
                waiting = missing.to(tl.int32)
                chosen = tl.full([TILE], -1, tl.int32)
                placed = tl.sum(waiting, axis=0)
                misses -= placed
                placed = tl.minimum(placed, room)
                room -= placed
                while placed > 0:
                    lane = tl.min(tl.where(waiting > 0, lanes, TILE), axis=0)
                    place = tl.min(tl.where(empty > 0, places, CAPACITY), axis=0)
                    if place == CAPACITY:
                        # Two reductions: scores use all 64 bits, so no bits are left to carry the slot along.
                        least = tl.min(tl.where(evictable > 0, stored_scores, _GREATEST_SCORE), axis=0)
                        victims = (evictable > 0) & (stored_scores == least)
                        place = tl.min(tl.where(victims, places, CAPACITY), axis=0)
                    chosen = tl.where(lanes == lane, place, chosen)
                    waiting = tl.where(lanes == lane, 0, waiting)
                    empty = tl.where(places == place, 0, empty)
                    evictable = tl.where(places == place, 0, evictable)
                    placed -= 1

                taken = chosen >= 0
                replaced = taken & (tl.load(digest_line + chosen, mask=taken, other=0) != 0)
                tl.store(evicted_keys + entry, tl.load(key_line + chosen, mask=replaced, other=0), mask=replaced)
                tl.store(evicted_scores + entry, tl.load(score_line + chosen, mask=replaced, other=0), mask=replaced)
                key = tl.load(keys + entry, mask=taken, other=0)
                tl.store(digest_line + chosen, digest_of(mix(key)), mask=taken)
                tl.store(key_line + chosen, key, mask=taken)
                tl.store(score_line + chosen, tl.load(scores + entry, mask=taken, other=0), mask=taken)
                tl.store(slots + entry, bucket + chosen, mask=taken)
                outcome = tl.where(taken, tl.where(replaced, _REPLACED, _INSERTED), _REFUSED)
                tl.store(status + entry, outcome.to(tl.int8), mask=missing)
                window += TILE

        heads &= lanes != head
        head = tl.min(tl.where(heads, lanes, TILE), axis=0)


def insert(view: GroupView, unique: UniqueKeys, slots: torch.Tensor, scores: torch.Tensor) -> Insertion:
    entries = slots.numel()
    status = torch.empty(entries, dtype=torch.int8, device=slots.device)
    evicted_keys, evicted_scores = torch.empty_like(slots), torch.empty_like(slots)
    launch(
        _insert_kernel, triton.cdiv(entries, _TILE), view.addresses, view.geometry, unique.count, unique.keys,
        unique.tables, aligned(scores), slots, status, evicted_keys, evicted_scores, view.addresses.shape[1],
        view.world_size, CAPACITY=view.bucket_capacity, TILE=_TILE, options=_OPTIONS,
    )  # fmt: skip
    return Insertion(status, evicted_keys, evicted_scores)
