"""Find on the CPU: one bucket's digest line, 64 digests at a time, then the keys of the few that match."""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
import torch

from dynamicemb.kernels.digests_cpu import first_match
from dynamicemb.kernels.hashing.cpu import bucket_of, digest_of, mix, place_of
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS, NO_SLOT
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
from dynamicemb.kernels.views import (
    AddressRow,
    GeometryColumn,
    GroupView,
    KeyBatch,
    KeyStatus,
    Scores,
    ScoreSource,
    UniqueKeys,
)

_DIGESTS, _KEYS, _SCORES = np.int64(AddressRow.DIGESTS), np.int64(AddressRow.KEYS), np.int64(AddressRow.SCORES)
_MAX_BUCKETS, _SHIFT, _LEVELS = (
    np.int64(GeometryColumn.MAX_BUCKETS),
    np.int64(GeometryColumn.SHIFT),
    np.int64(GeometryColumn.LEVELS),
)
_MAX_CHUNKS = np.int64(MAX_CHUNKS)
_NO_SLOT = np.int64(NO_SLOT)
_FOUND = np.int8(KeyStatus.FOUND)
_ENTRY, _DIFFERENCE = np.int64(ScoreSource.ENTRY), np.int64(ScoreSource.DIFFERENCE)
_NEXT = np.int64(ScoreSource.NEXT)
_CHUNK_SHIFT = np.int64(CHUNK_SHIFT)
_NO_STATUS = np.empty(0, np.int8)
# Keys between two stages, and what is remembered of those in between: a power of two above twice that.
_DISTANCE = 16
_RING = 64
_RING_MASK, _RING_BYTES = _RING - 1, 8 * _RING


@inline
def bucket_place(geometry, table, mixed, world_size):
    """(chunk of the table, index of the bucket in the chunk) for a key of ``table``."""
    levels = np.uint64(geometry[table, _LEVELS])
    bucket = bucket_of(mixed, world_size, np.uint64(geometry[table, _MAX_BUCKETS]), np.uint64(geometry[table, _SHIFT]))
    return place_of(bucket, levels)


@inline
def score_of(numbers, source, entry, table):
    """See :class:`~dynamicemb.kernels.views.ScoreSource`."""
    if source == _ENTRY:
        return numbers[entry]
    if source == _DIFFERENCE:
        return numbers[entry + 1] - numbers[entry]
    if source == _NEXT:
        return numbers[table] + 1
    return numbers[table]


@kernel
def _find(
    start, stop, addresses, geometry, capacity, world_size, keys, tables, scores, source, touch, accumulate, slots,
    status,
):  # fmt: skip
    """In three stages, each for a key that lies a few keys behind that of the stage before it, so that the random
    accesses of many keys are under way at once: the digest line, the keys of the slots that match, and the rest."""
    chunks, firsts = as_int64(stack_bytes(_RING_BYTES)), as_int64(stack_bytes(_RING_BYTES))
    candidates, digests = as_int64(stack_bytes(_RING_BYTES)), as_bytes(stack_bytes(_RING))
    for step in range(start, stop + 2 * _DISTANCE):
        if step < stop:
            i = step & _RING_MASK
            mixed, table = mix(keys[step]), np.int64(tables[step])
            chunk, index = bucket_place(geometry, table, mixed, world_size)
            chunks[i], firsts[i] = table * _MAX_CHUNKS + chunk, index * capacity
            digests[i] = digest_of(mixed)
            prefetch(addresses[_DIGESTS, chunks[i]] + firsts[i], capacity)
        u = step - _DISTANCE
        if start <= u < stop:
            i = u & _RING_MASK
            line, first_key = addresses[_DIGESTS, chunks[i]] + firsts[i], addresses[_KEYS, chunks[i]] + firsts[i] * 8
            first_score = addresses[_SCORES, chunks[i]] + firsts[i] * 8
            slot = first_match(line, digests[i], np.int64(0), capacity)
            candidates[i] = slot
            while slot != _NO_SLOT:
                prefetch(first_key + slot * 8, 8)
                if touch:
                    prefetch_to_write(first_score + slot * 8, 8)
                slot = first_match(line, digests[i], slot + 1, capacity)
        u = step - 2 * _DISTANCE
        if start <= u:
            i = u & _RING_MASK
            at, slot, key = chunks[i], candidates[i], keys[u]
            keys_here = as_int64(addresses[_KEYS, at] + firsts[i] * 8)
            while slot != _NO_SLOT and keys_here[slot] != key:
                slot = first_match(addresses[_DIGESTS, at] + firsts[i], digests[i], slot + 1, capacity)
            if slot == _NO_SLOT:
                slots[u] = _NO_SLOT
                continue
            slots[u] = (at << _CHUNK_SHIFT) | (firsts[i] + slot)
            if touch:
                stored = as_int64(addresses[_SCORES, at] + firsts[i] * 8)
                score = score_of(scores, source, u, tables[u])
                if accumulate:
                    stored[slot] += score
                else:
                    stored[slot] = score
                if status.size > 0:
                    status[u] = _FOUND


def find(
    view: GroupView,
    batch: Union[UniqueKeys, KeyBatch],
    scores: Optional[Scores],
    accumulate: bool,
    status: Optional[torch.Tensor],
) -> torch.Tensor:
    slots = torch.empty_like(batch.keys)
    given = Scores(batch.keys) if scores is None else scores
    parallel_for(
        _find, batch.keys.numel(), view.addresses.numpy(), view.geometry.numpy(), np.int64(view.bucket_capacity),
        np.uint64(view.world_size), batch.keys.numpy(), batch.tables.numpy(), given.numbers.numpy(),
        np.int64(given.source), scores is not None, accumulate, slots.numpy(),
        _NO_STATUS if status is None else status.numpy(),
    )  # fmt: skip
    return slots
