"""Find on the CPU: one bucket's digest line, eight digests at a time, then the keys of the few that match."""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import bucket_of, digest_of, mix, place_of
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS, NO_SLOT
from dynamicemb.kernels.numba_support import (
    as_int64,
    as_uint64,
    inline,
    kernel,
    parallel_for,
    prefetch,
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
_EVERY_BYTE, _LOW_7_BITS = np.uint64(0x0101010101010101), np.uint64(0x7F7F7F7F7F7F7F7F)
_0, _8 = np.uint64(0), np.uint64(8)
_CHUNK_SHIFT = np.int64(CHUNK_SHIFT)
_NO_STATUS = np.empty(0, np.int8)
# Keys of a block: more than a core has memory accesses under way.
_BLOCK = 32


@inline
def bucket_place(geometry, table, mixed, world_size):
    """(chunk of the table, index of the bucket in the chunk) for a key of ``table``."""
    levels = np.uint64(geometry[table, _LEVELS])
    bucket = bucket_of(mixed, world_size, np.uint64(geometry[table, _MAX_BUCKETS]), np.uint64(geometry[table, _SHIFT]))
    return place_of(bucket, levels)


@inline
def first_match(digests, pattern, slot, capacity):
    """First slot from ``slot`` on whose digest is that of ``pattern``, or −1; ``digests`` is the bucket's line."""
    words = as_uint64(digests)
    while slot < capacity:
        difference = words[slot >> 3] ^ pattern
        # The high bit of each byte that is zero, exactly: no carry crosses a byte. Bytes before ``slot`` are left out.
        matches = ~(((difference & _LOW_7_BITS) + _LOW_7_BITS) | difference | _LOW_7_BITS)
        matches >>= np.uint64((slot & 7) * 8)
        if matches != _0:
            while matches & np.uint64(0x80) == _0:
                matches >>= _8
                slot += 1
            return np.int64(slot)
        slot = (slot | 7) + 1
    return _NO_SLOT


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
    """In blocks, and each block in three rounds, so that a round's random accesses are under way all at once."""
    chunks, firsts = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    candidates, patterns = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64)
    for block in range(start, stop, _BLOCK):
        size = min(_BLOCK, stop - block)
        for i in range(size):
            mixed, table = mix(keys[block + i]), np.int64(tables[block + i])
            chunk, index = bucket_place(geometry, table, mixed, world_size)
            chunks[i], firsts[i] = table * _MAX_CHUNKS + chunk, index * capacity
            patterns[i] = np.uint64(digest_of(mixed)) * _EVERY_BYTE
            prefetch(addresses[_DIGESTS, chunks[i]] + firsts[i], capacity)
        for i in range(size):
            at = chunks[i]
            slot = first_match(addresses[_DIGESTS, at] + firsts[i], patterns[i], np.int64(0), capacity)
            candidates[i] = slot
            if slot != _NO_SLOT:
                prefetch(addresses[_KEYS, at] + (firsts[i] + slot) * 8, 8)
                if touch:
                    prefetch(addresses[_SCORES, at] + (firsts[i] + slot) * 8, 8)
        for i in range(size):
            at, slot, key = chunks[i], candidates[i], keys[block + i]
            keys_here = as_int64(addresses[_KEYS, at] + firsts[i] * 8)
            while slot != _NO_SLOT and keys_here[slot] != key:
                slot = first_match(addresses[_DIGESTS, at] + firsts[i], patterns[i], slot + 1, capacity)
            if slot == _NO_SLOT:
                slots[block + i] = _NO_SLOT
                continue
            slots[block + i] = (at << _CHUNK_SHIFT) | (firsts[i] + slot)
            if touch:
                stored = as_int64(addresses[_SCORES, at] + firsts[i] * 8)
                score = score_of(scores, source, block + i, tables[block + i])
                if accumulate:
                    stored[slot] += score
                else:
                    stored[slot] = score
                if status.size > 0:
                    status[block + i] = _FOUND


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
