"""Insertion and eviction on the CPU. A bucket's keys are neighbours in the batch, and one thread owns all of them."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.find.cpu import bucket_place, score_of
from dynamicemb.kernels.hashing.cpu import digest_of, mix, offset_of, slot_handle
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.layout import MAX_CHUNKS, NO_SLOT
from dynamicemb.kernels.numba_support import as_bytes, as_int64, inline, kernel, parallel_for
from dynamicemb.kernels.views import AddressRow, GroupView, KeyStatus, Scores, UniqueKeys

_DIGESTS, _KEYS, _SCORES = np.int64(AddressRow.DIGESTS), np.int64(AddressRow.KEYS), np.int64(AddressRow.SCORES)
_INSERTED, _REPLACED = np.int8(KeyStatus.INSERTED), np.int8(KeyStatus.REPLACED)
_REFUSED = np.int8(KeyStatus.REFUSED)
_MAX_CHUNKS = np.int64(MAX_CHUNKS)
_NO_SLOT = np.int64(NO_SLOT)


@inline
def _free_slot(digests, keys, scores, touched, capacity):
    """The first empty slot, else the untouched one with the least (score, key), else −1; and whether it was empty."""
    victim = _NO_SLOT
    for slot in range(capacity):
        if digests[slot] == 0:
            return np.int64(slot), True
        if touched[slot]:
            continue
        if victim != _NO_SLOT:
            if scores[slot] > scores[victim] or (scores[slot] == scores[victim] and keys[slot] > keys[victim]):
                continue
        victim = np.int64(slot)
    return victim, False


@inline
def _same_bucket(addresses, geometry, world_size, keys, tables, u, v):
    if tables[u] != tables[v]:
        return False
    chunk_u, index_u = bucket_place(geometry, tables[u], mix(keys[u]), world_size)
    chunk_v, index_v = bucket_place(geometry, tables[v], mix(keys[v]), world_size)
    return chunk_u == chunk_v and index_u == index_v


@inline
def _insert_bucket(
    first_key, last_key, addresses, geometry, capacity, world_size, keys, tables, scores, source, slots, status,
    touched, evicted_keys, evicted_scores,
):  # fmt: skip
    """Places what is missing of the keys from ``first_key`` to ``last_key``, all that the batch has of one bucket."""
    table = np.int64(tables[first_key])
    chunk, index = bucket_place(geometry, table, mix(keys[first_key]), world_size)
    at = table * _MAX_CHUNKS + chunk
    first = index * capacity
    digests = as_bytes(addresses[_DIGESTS, at] + first)
    keys_here = as_int64(addresses[_KEYS, at] + first * 8)
    scores_here = as_int64(addresses[_SCORES, at] + first * 8)
    touched[:] = False
    for v in range(first_key, last_key):
        if slots[v] != _NO_SLOT:
            touched[offset_of(slots[v]) - first] = True
    for v in range(first_key, last_key):
        if slots[v] != _NO_SLOT:
            continue
        slot, empty = _free_slot(digests, keys_here, scores_here, touched, capacity)
        if slot == _NO_SLOT:
            status[v] = _REFUSED
            continue
        if empty:
            status[v] = _INSERTED
        else:
            status[v] = _REPLACED
            evicted_keys[v] = keys_here[slot]
            evicted_scores[v] = scores_here[slot]
        touched[slot] = True
        digests[slot] = digest_of(mix(keys[v]))
        keys_here[slot] = keys[v]
        scores_here[slot] = score_of(scores, source, v, table)
        slots[v] = slot_handle(table, chunk, first + slot)


@kernel
def _insert(
    start, stop, addresses, geometry, capacity, world_size, keys, tables, scores, source, slots, status,
    evicted_keys, evicted_scores,
):  # fmt: skip
    touched = np.empty(capacity, np.bool_)
    # A bucket belongs to the range in which its first key lies: whole buckets from here on.
    while 0 < start < stop and _same_bucket(addresses, geometry, world_size, keys, tables, start - 1, start):
        start += 1
    while start < stop < keys.size and _same_bucket(addresses, geometry, world_size, keys, tables, stop - 1, stop):
        stop += 1
    u = start
    while u < stop:
        if slots[u] != _NO_SLOT:  # nearly all, in steady state: their buckets are not even looked at
            u += 1
            continue
        first, last = u, u + 1
        while first > start and _same_bucket(addresses, geometry, world_size, keys, tables, first - 1, first):
            first -= 1
        while last < stop and _same_bucket(addresses, geometry, world_size, keys, tables, last - 1, last):
            last += 1
        _insert_bucket(
            first, last, addresses, geometry, capacity, world_size, keys, tables, scores, source, slots, status,
            touched, evicted_keys, evicted_scores,
        )  # fmt: skip
        u = last


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
