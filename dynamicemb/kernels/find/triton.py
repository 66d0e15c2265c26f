"""Find on the GPU: each key's digest line as one vector, then the stored keys behind the digests that match.

Two dependent round trips to memory for a key. A line of 128 digests gives about half a false match when it is full;
loading every match at once costs less than a loop that loads them one by one, and needs no second pass.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.layout import NO_SLOT
from dynamicemb.kernels.triton_support import (
    aligned,
    bucket_slot,
    digest_of,
    key_pointers,
    line_pointers,
    mix,
    score_pointers,
)
from dynamicemb.kernels.views import GroupView, UniqueKeys

_NO_SLOT = tl.constexpr(NO_SLOT)

# 1024 digests for two warps: 16 bytes, one load, for each thread.
_DIGESTS_PER_PROGRAM = 1024
_OPTIONS = LaunchOptions(num_warps=2)


@triton.jit(do_not_specialize=["chunks", "world_size"])
def _find_kernel(
    addresses, geometry, count, keys, tables, scores, slots, chunks, world_size, CAPACITY: tl.constexpr,
    TILE: tl.constexpr, TOUCH: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    first = tl.program_id(0).to(tl.int64) * TILE
    if first >= entries:
        return
    entry = first + tl.arange(0, TILE)
    inside = entry < entries
    key = tl.load(keys + entry, mask=inside, other=0)
    mixed = mix(key)
    bucket = bucket_slot(geometry, mixed, tl.load(tables + entry, mask=inside, other=0), world_size, inside, CAPACITY)
    lanes = tl.arange(0, CAPACITY)
    lines = line_pointers(addresses, chunks, bucket, inside, CAPACITY)
    digests = tl.load(lines[:, None] + lanes[None, :], mask=inside[:, None], other=0)
    matches = digests == digest_of(mixed)[:, None]  # a digest is never 0, so neither is a masked one a match
    stored = key_pointers(addresses, chunks, bucket, inside)
    matches &= tl.load(stored[:, None] + lanes[None, :], mask=matches, other=0) == key[:, None]
    lane = tl.max(tl.where(matches, lanes[None, :], _NO_SLOT), axis=1)
    found = lane >= 0
    tl.store(slots + entry, tl.where(found, bucket + lane, _NO_SLOT), mask=inside)
    if TOUCH:
        score = tl.load(scores + entry, mask=found, other=0)
        touched = score_pointers(addresses, chunks, bucket + lane, found)
        if ACCUMULATE:
            score += tl.load(touched, mask=found, other=0)
        tl.store(touched, score, mask=found)


def find(view: GroupView, unique: UniqueKeys, scores: Optional[torch.Tensor], accumulate: bool) -> torch.Tensor:
    entries = unique.keys.numel()
    slots = torch.empty_like(unique.keys)
    tile = max(1, _DIGESTS_PER_PROGRAM // view.bucket_capacity)
    launch(
        _find_kernel, triton.cdiv(entries, tile), view.addresses, view.geometry, unique.count, unique.keys,
        unique.tables, slots if scores is None else aligned(scores), slots, view.addresses.shape[1], view.world_size,
        CAPACITY=view.bucket_capacity, TILE=tile, TOUCH=scores is not None, ACCUMULATE=accumulate, options=_OPTIONS,
    )  # fmt: skip
    return slots
