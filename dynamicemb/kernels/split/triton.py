"""Doubling on the GPU: one program for eight slots of an old bucket; slots do not depend on each other."""

from __future__ import annotations

import triton
import triton.language as tl

from dynamicemb.kernels.launch import launch
from dynamicemb.kernels.rows_triton import (
    word_pointers,
)
from dynamicemb.kernels.triton_support import (
    bucket_slot,
    digest_pointers,
    first_slot,
    key_pointers,
    mix,
    score_pointers,
)
from dynamicemb.kernels.views import GeometryColumn, GroupView

_GEOMETRY_COLUMNS = tl.constexpr(len(GeometryColumn))
_LEVELS = tl.constexpr(int(GeometryColumn.LEVELS))

# 4 KiB of rows in flight: 32 bytes for each of 128 threads. Every bucket capacity is a multiple of 8.
_SLOTS = 8
_WORDS = 128


@triton.jit(do_not_specialize=["table", "chunks", "world_size"])
def _split_kernel(
    addresses, geometry, table, chunks, world_size, CAPACITY: tl.constexpr, ROW_BYTES: tl.constexpr,
    SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * SLOTS
    places = first % CAPACITY + tl.arange(0, SLOTS)
    levels = tl.load(geometry + table.to(tl.int64) * _GEOMETRY_COLUMNS + _LEVELS)
    # Bucket 2b lies where bucket b was.
    source = first_slot(first // CAPACITY * 2, levels, table, CAPACITY) + places
    tables = table + tl.zeros([SLOTS], tl.int32)
    everywhere = tables >= 0
    digest_at = digest_pointers(addresses, chunks, source, everywhere)
    digest = tl.load(digest_at)
    key = tl.load(key_pointers(addresses, chunks, source, everywhere))
    target = bucket_slot(geometry, mix(key), tables, world_size, everywhere, CAPACITY) + places
    moves = (digest != 0) & (target != source)
    if tl.max(moves.to(tl.int32), axis=0) == 0:
        return
    score = tl.load(score_pointers(addresses, chunks, source, everywhere))
    tl.store(digest_pointers(addresses, chunks, target, moves), digest, mask=moves)
    tl.store(key_pointers(addresses, chunks, target, moves), key, mask=moves)
    tl.store(score_pointers(addresses, chunks, target, moves), score, mask=moves)
    # The warps read the digests apart, for the rows that each of them moves, and threads of one warp clear them.
    tl.debug_barrier()
    tl.store(digest_at, tl.zeros_like(digest), mask=moves)
    row_from = word_pointers(addresses, chunks, source, moves, ROW_BYTES)
    row_to = word_pointers(addresses, chunks, target, moves, ROW_BYTES)
    for word in range(0, ROW_BYTES // 4, WORDS):
        words = word + tl.arange(0, WORDS)
        mask = moves[:, None] & (words < ROW_BYTES // 4)[None, :]
        tl.store(row_to[:, None] + words[None, :], tl.load(row_from[:, None] + words[None, :], mask=mask), mask=mask)


def split(view: GroupView, table: int, buckets: int) -> None:
    launch(
        _split_kernel, buckets * view.bucket_capacity // _SLOTS, view.addresses, view.geometry, table,
        view.addresses.shape[1], view.world_size, CAPACITY=view.bucket_capacity, ROW_BYTES=view.layout.row_bytes,
        SLOTS=_SLOTS, WORDS=_WORDS,
    )  # fmt: skip
