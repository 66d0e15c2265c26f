"""Find on the CPU: one bucket's digest line, eight digests at a time, then the keys of the few that match."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import bucket_of, digest_of, mix, place_of, slot_handle
from dynamicemb.kernels.layout import MAX_CHUNKS, NO_SLOT
from dynamicemb.kernels.numba_support import (
    PREFETCH_DISTANCE,
    as_int64,
    as_uint64,
    inline,
    kernel,
    parallel_for,
    prefetch,
)
from dynamicemb.kernels.views import AddressRow, GeometryColumn, GroupView, UniqueKeys

_DIGESTS, _KEYS, _SCORES = np.int64(AddressRow.DIGESTS), np.int64(AddressRow.KEYS), np.int64(AddressRow.SCORES)
_MAX_BUCKETS, _SHIFT, _LEVELS = (
    np.int64(GeometryColumn.MAX_BUCKETS),
    np.int64(GeometryColumn.SHIFT),
    np.int64(GeometryColumn.LEVELS),
)
_MAX_CHUNKS = np.int64(MAX_CHUNKS)
_NO_SLOT = np.int64(NO_SLOT)
_EVERY_BYTE, _LOW_7_BITS = np.uint64(0x0101010101010101), np.uint64(0x7F7F7F7F7F7F7F7F)
_0, _1, _8 = np.uint64(0), np.uint64(1), np.uint64(8)


@inline
def bucket_place(geometry, table, mixed, world_size):
    """(chunk of the table, index of the bucket in the chunk) for a key of ``table``."""
    levels = np.uint64(geometry[table, _LEVELS])
    bucket = bucket_of(mixed, world_size, np.uint64(geometry[table, _MAX_BUCKETS]), np.uint64(geometry[table, _SHIFT]))
    return place_of(bucket, levels)


@inline
def find_in_bucket(digests, keys, key, digest, capacity):
    """Slot of ``key`` in the bucket whose digests and keys begin at these addresses, or −1."""
    words = as_uint64(digests)
    keys_here = as_int64(keys)
    pattern = np.uint64(digest) * _EVERY_BYTE
    for word in range(capacity // 8):
        difference = words[word] ^ pattern
        # The high bit of each byte that is zero, exactly: no carry crosses a byte.
        matches = ~(((difference & _LOW_7_BITS) + _LOW_7_BITS) | difference | _LOW_7_BITS)
        slot = word * 8
        while matches != _0:
            while matches & np.uint64(0x80) == _0:
                matches >>= _8
                slot += 1
            if keys_here[slot] == key:
                return np.int64(slot)
            matches >>= _8
            slot += 1
    return _NO_SLOT


@inline
def digest_line(addresses, geometry, capacity, world_size, key, table):
    """Address of the digests of the bucket of ``key``."""
    chunk, index = bucket_place(geometry, np.int64(table), mix(key), world_size)
    return addresses[_DIGESTS, np.int64(table) * _MAX_CHUNKS + chunk] + index * capacity


@kernel
def _find(start, stop, addresses, geometry, capacity, world_size, keys, tables, scores, touch, accumulate, slots):
    for u in range(start, stop):
        ahead = min(u + PREFETCH_DISTANCE, stop - 1)
        prefetch(digest_line(addresses, geometry, capacity, world_size, keys[ahead], tables[ahead]), capacity)
        table = np.int64(tables[u])
        mixed = mix(keys[u])
        chunk, index = bucket_place(geometry, table, mixed, world_size)
        at = table * _MAX_CHUNKS + chunk
        first = index * capacity
        slot = find_in_bucket(
            addresses[_DIGESTS, at] + first, addresses[_KEYS, at] + first * 8, keys[u], digest_of(mixed), capacity
        )
        if slot == _NO_SLOT:
            slots[u] = _NO_SLOT
            continue
        slots[u] = slot_handle(table, chunk, first + slot)
        if touch:
            stored = as_int64(addresses[_SCORES, at])
            if accumulate:
                stored[first + slot] += scores[u]
            else:
                stored[first + slot] = scores[u]


def find(view: GroupView, unique: UniqueKeys, scores: Optional[torch.Tensor], accumulate: bool) -> torch.Tensor:
    slots = torch.empty_like(unique.keys)
    given = unique.keys if scores is None else scores
    parallel_for(
        _find, unique.keys.numel(), view.addresses.numpy(), view.geometry.numpy(), np.int64(view.bucket_capacity),
        np.uint64(view.world_size), unique.keys.numpy(), unique.tables.numpy(), given.numpy(), scores is not None,
        accumulate, slots.numpy(),
    )  # fmt: skip
    return slots
