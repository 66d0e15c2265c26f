"""Insertion and eviction on the CPU. A bucket's keys are neighbours in the batch, and one thread owns all of them."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.digests_cpu import first_match
from dynamicemb.kernels.find.cpu import bucket_place, score_of
from dynamicemb.kernels.hashing.cpu import chunk_of, digest_of, mix, offset_of, slot_handle
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.layout import MAX_CHUNKS, NO_SLOT
from dynamicemb.kernels.numba_support import (
    as_bytes,
    as_int64,
    inline,
    kernel,
    parallel_for,
    prefetch,
    prefetch_to_write,
    stack_bytes,
)
from dynamicemb.kernels.views import AddressRow, GroupView, KeyStatus, Scores, UniqueKeys
from dynamicemb.options import BUCKET_CAPACITIES

_DIGESTS, _KEYS, _SCORES = np.int64(AddressRow.DIGESTS), np.int64(AddressRow.KEYS), np.int64(AddressRow.SCORES)
_INSERTED, _REPLACED = np.int8(KeyStatus.INSERTED), np.int8(KeyStatus.REPLACED)
_REFUSED = np.int8(KeyStatus.REFUSED)
_MAX_CHUNKS = np.int64(MAX_CHUNKS)
_NO_SLOT = np.int64(NO_SLOT)
_MAX_CAPACITY = max(BUCKET_CAPACITIES)
_EMPTY = np.uint8(0)
# A bucket's digests are asked for this many keys before they are read, and keys and scores written as many keys after
# their place is known: until then the cache lines have arrived.
_DISTANCE = 16


@inline
def _same_bucket(addresses, geometry, world_size, keys, tables, u, v):
    if tables[u] != tables[v]:
        return False
    chunk_u, index_u = bucket_place(geometry, tables[u], mix(keys[u]), world_size)
    chunk_v, index_v = bucket_place(geometry, tables[v], mix(keys[v]), world_size)
    return chunk_u == chunk_v and index_u == index_v


@inline
def _mark_touched(u, start, stop, addresses, geometry, world_size, keys, tables, slots, first_slot, touched, capacity):
    """Marks the slots that the batch has touched so far in the bucket of key ``u``, with those of ``[start, stop)``."""
    for slot in range(capacity):
        touched[slot] = 0
    first, last = u, u + 1
    while first > start and _same_bucket(addresses, geometry, world_size, keys, tables, first - 1, u):
        first -= 1
    while last < stop and _same_bucket(addresses, geometry, world_size, keys, tables, last, u):
        last += 1
    for v in range(first, last):
        if slots[v] != _NO_SLOT:
            touched[offset_of(slots[v]) - first_slot] = 1


@inline
def _victim(keys, scores, touched, capacity):
    """The untouched slot with the least (score, key) of a full bucket, or −1."""
    victim = _NO_SLOT
    for slot in range(capacity):
        if touched[slot] != 0:
            continue
        if victim != _NO_SLOT:
            if scores[slot] > scores[victim] or (scores[slot] == scores[victim] and keys[slot] > keys[victim]):
                continue
        victim = np.int64(slot)
    return victim


@inline
def _store(u, addresses, keys, tables, scores, source, slots, status):
    """Writes the key and the score of key ``u`` to the slot that it has been given."""
    if status[u] == _INSERTED or status[u] == _REPLACED:
        at, offset = chunk_of(slots[u]), offset_of(slots[u])
        as_int64(addresses[_KEYS, at])[offset] = keys[u]
        as_int64(addresses[_SCORES, at])[offset] = score_of(scores, source, u, tables[u])


@kernel
def _insert(
    start, stop, addresses, geometry, capacity, world_size, keys, tables, scores, source, slots, status,
    evicted_keys, evicted_scores,
):  # fmt: skip
    # A bucket belongs to the range in which its first key lies: whole buckets from here on.
    while 0 < start < stop and _same_bucket(addresses, geometry, world_size, keys, tables, start - 1, start):
        start += 1
    while start < stop < keys.size and _same_bucket(addresses, geometry, world_size, keys, tables, stop - 1, stop):
        stop += 1
    touched = as_bytes(stack_bytes(_MAX_CAPACITY))
    # The bucket of the key before: where it is, its first slot, from which slot on it may have empty ones, and whether
    # ``touched`` is about it.
    at, first_slot, free_from, marked = np.int64(-1), np.int64(-1), np.int64(0), False
    for u in range(start, stop):
        ahead = u + _DISTANCE
        if ahead < stop and slots[ahead] == _NO_SLOT:
            table = np.int64(tables[ahead])
            chunk, index = bucket_place(geometry, table, mix(keys[ahead]), world_size)
            prefetch(addresses[_DIGESTS, table * _MAX_CHUNKS + chunk] + index * capacity, capacity)
        if u - start >= _DISTANCE:
            _store(u - _DISTANCE, addresses, keys, tables, scores, source, slots, status)
        if slots[u] != _NO_SLOT:  # nearly all, in steady state: their buckets are not even looked at
            continue
        table, mixed = np.int64(tables[u]), mix(keys[u])
        chunk, index = bucket_place(geometry, table, mixed, world_size)
        if at != table * _MAX_CHUNKS + chunk or first_slot != index * capacity:
            at, first_slot, free_from, marked = table * _MAX_CHUNKS + chunk, index * capacity, np.int64(0), False
        digests = addresses[_DIGESTS, at] + first_slot
        keys_here, scores_here = addresses[_KEYS, at] + first_slot * 8, addresses[_SCORES, at] + first_slot * 8
        slot = first_match(digests, _EMPTY, free_from, capacity)
        status[u] = _INSERTED
        if slot == _NO_SLOT:
            free_from = capacity
            if not marked:
                _mark_touched(
                    u, start, stop, addresses, geometry, world_size, keys, tables, slots, first_slot, touched,
                    capacity,
                )  # fmt: skip
                marked = True
            slot = _victim(as_int64(keys_here), as_int64(scores_here), touched, capacity)
            if slot == _NO_SLOT:
                status[u] = _REFUSED
                continue
            status[u] = _REPLACED
            evicted_keys[u] = as_int64(keys_here)[slot]
            evicted_scores[u] = as_int64(scores_here)[slot]
            touched[slot] = 1
        else:
            free_from = slot + 1
            prefetch_to_write(keys_here + slot * 8, 8)
            prefetch_to_write(scores_here + slot * 8, 8)
        as_bytes(digests)[slot] = digest_of(mixed)
        slots[u] = slot_handle(table, chunk, first_slot + slot)
    for u in range(max(start, stop - _DISTANCE), stop):
        _store(u, addresses, keys, tables, scores, source, slots, status)


def insert(
    view: GroupView, unique: UniqueKeys, slots: torch.Tensor, scores: Scores, status: Optional[torch.Tensor]
) -> Insertion:
    if status is None:
        status = torch.zeros(slots.numel(), dtype=torch.int8)  # FOUND
    evicted_keys, evicted_scores = torch.empty_like(slots), torch.empty_like(slots)
    parallel_for(
        _insert, slots.numel(), view.addresses.numpy(), view.geometry.numpy(), np.int64(view.bucket_capacity),
        np.uint64(view.world_size), unique.keys.numpy(), unique.tables.numpy(), scores.numbers.numpy(),
        np.int64(scores.source), slots.numpy(), status.numpy(), evicted_keys.numpy(), evicted_scores.numpy(),
    )  # fmt: skip
    return Insertion(status, evicted_keys, evicted_scores)
