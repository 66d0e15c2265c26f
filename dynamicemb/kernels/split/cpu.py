"""Doubling on the CPU: each old bucket is visited once, and only the entries that leave it are copied."""

from __future__ import annotations

import numpy as np

from dynamicemb.kernels.find.cpu import bucket_place
from dynamicemb.kernels.hashing.cpu import mix, place_of
from dynamicemb.kernels.layout import MAX_CHUNKS
from dynamicemb.kernels.numba_support import as_bytes, as_int64, as_uint64, kernel, parallel_for
from dynamicemb.kernels.views import AddressRow, GeometryColumn, GroupView

_DIGESTS, _KEYS = np.int64(AddressRow.DIGESTS), np.int64(AddressRow.KEYS)
_SCORES, _ROWS = np.int64(AddressRow.SCORES), np.int64(AddressRow.ROWS)
_LEVELS = np.int64(GeometryColumn.LEVELS)
_MAX_CHUNKS = np.int64(MAX_CHUNKS)


@kernel
def _split(start, stop, addresses, geometry, capacity, world_size, row_bytes, table):
    base = table * _MAX_CHUNKS
    levels = np.uint64(geometry[table, _LEVELS])
    target_at = base + geometry[table, _LEVELS]
    for bucket in range(start, stop):
        chunk, index = place_of(np.uint64(2 * bucket), levels)
        at = base + chunk
        first = index * capacity
        target_first = np.int64(bucket) * capacity  # bucket 2b + 1 lies at index b of the new chunk
        digests = as_bytes(addresses[_DIGESTS, at])
        keys, scores = as_int64(addresses[_KEYS, at]), as_int64(addresses[_SCORES, at])
        for slot in range(capacity):
            source = first + slot
            if digests[source] == 0:
                continue
            new_chunk, _ = bucket_place(geometry, table, mix(keys[source]), world_size)
            if new_chunk == chunk:
                continue
            target = target_first + slot
            as_bytes(addresses[_DIGESTS, target_at])[target] = digests[source]
            as_int64(addresses[_KEYS, target_at])[target] = keys[source]
            as_int64(addresses[_SCORES, target_at])[target] = scores[source]
            row_from = as_uint64(addresses[_ROWS, at] + source * row_bytes)
            row_to = as_uint64(addresses[_ROWS, target_at] + target * row_bytes)
            for word in range(row_bytes // 8):
                row_to[word] = row_from[word]
            digests[source] = 0


def split(view: GroupView, table: int, buckets: int) -> None:
    parallel_for(
        _split, buckets, view.addresses.numpy(), view.geometry.numpy(), np.int64(view.bucket_capacity),
        np.uint64(view.world_size), np.int64(view.layout.row_bytes), np.int64(table),
    )  # fmt: skip
