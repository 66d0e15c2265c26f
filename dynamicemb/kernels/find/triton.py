"""Find on the GPU: each key's digest line in pieces of 16, then the stored keys behind the digests that match.

A warp looks for eight keys at once: 64 pieces, two for each lane. Everything is computed where it is needed, also what
the pieces of a key have in common, so that no lane waits for what another one has; four digests are compared by one
exclusive or and a test for zero bytes. Two dependent round trips to memory follow the address of the bucket: the line,
and the key. A full line of 128 digests gives about half a false match, but rarely two in one piece, so the loop over
a piece's matches seldom goes round twice.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, grid_stride_programs, launch
from dynamicemb.kernels.layout import NO_SLOT
from dynamicemb.kernels.triton_support import (
    aligned,
    bucket_slot,
    digest_of,
    digest_pointers,
    key_pointers,
    mix,
    score_of,
    score_pointers,
    table_of,
)
from dynamicemb.kernels.views import GroupView, KeyBatch, KeyStatus, Scores, UniqueKeys

_NO_SLOT = tl.constexpr(NO_SLOT)
_FOUND = tl.constexpr(int(KeyStatus.FOUND))
#: Instead of the number of keys, where only the device knows it.
_COUNTED = tl.constexpr(-1)

# Digests of a piece at most.
_PIECE = 16
# Pieces of a program: two for each lane of its one warp.
_PIECES_PER_PROGRAM = 64
# As many as let an SM hold 32 programs, which is the most that it holds of any size.
_OPTIONS = LaunchOptions(num_warps=1, maxnreg=64)


@triton.jit
def _zero_bytes(word):
    """int32: bit ``i`` tells whether byte ``i`` of a uint32 is zero."""
    # The high bit of each byte that is not zero, exactly: no carry crosses a byte. The product gathers the four bits.
    others = ((word & 0x7F7F7F7F) + 0x7F7F7F7F) | word | 0x7F7F7F7F
    return (((others ^ 0xFFFFFFFF) * 0x00204081) >> 28).to(tl.int32)


@triton.jit(do_not_specialize=["source", "total", "chunks", "world_size"])
def _find_kernel(
    addresses, geometry, count, keys, tables, scores, slots, status, source, total, chunks, world_size,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, TOUCH: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    entries = total.to(tl.int64)
    if total == _COUNTED:
        entries = tl.load(count)
    pieces = tl.zeros([TILE, 1], tl.int32) + tl.arange(0, CAPACITY // PIECE)[None, :]
    first = tl.program_id(0).to(tl.int64) * TILE
    while first < entries:
        place_in_batch = first + tl.arange(0, TILE)[:, None] + tl.zeros_like(pieces)
        # Past the end the last key is looked up again, so that no load needs a mask. It also keeps the compiler from
        # laying keys out for wide loads, which would cost more than they save: every later step would move them back.
        entry = tl.minimum(place_in_batch, entries - 1)
        key = tl.load(keys + entry)
        mixed = mix(key)
        everywhere = pieces >= 0
        bucket = bucket_slot(geometry, mixed, tl.load(tables + entry), world_size, everywhere, CAPACITY)
        line = digest_pointers(addresses, chunks, bucket, everywhere).to(tl.pointer_type(tl.uint64))
        stored = key_pointers(addresses, chunks, bucket, everywhere) + pieces * PIECE
        pattern = digest_of(mixed).to(tl.uint32) * 0x01010101
        matches = tl.zeros_like(pieces)
        for word in tl.static_range(PIECE // 8):
            digests = tl.load(line + pieces * (PIECE // 8) + word)
            matches |= _zero_bytes(digests.to(tl.uint32) ^ pattern) << (8 * word)
            matches |= _zero_bytes((digests >> 32).to(tl.uint32) ^ pattern) << (8 * word + 4)
        place = tl.full([TILE, CAPACITY // PIECE], _NO_SLOT, tl.int32)
        while tl.max(tl.max(matches, axis=1), axis=0) > 0:
            waiting = matches > 0
            # The first match of each piece. A power of two is exact in float32, so its exponent is the place.
            match = ((matches & -matches).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            hit = waiting & (tl.load(stored + match, mask=waiting, other=0) == key)
            place = tl.where(hit, pieces * PIECE + match, place)
            matches = tl.where(hit, 0, matches & (matches - 1))
        place = tl.max(place, axis=1)[:, None] + tl.zeros_like(pieces)
        found = place >= 0
        speaker = (place_in_batch < entries) & (pieces == 0)
        tl.store(slots + entry, tl.where(found, bucket + place, _NO_SLOT), mask=speaker)
        if TOUCH:
            touches = speaker & found
            tl.store(status + entry, tl.full([TILE, CAPACITY // PIECE], _FOUND, tl.int8), mask=touches)
            score = score_of(scores, source, entry, table_of(bucket), touches)
            touched = score_pointers(addresses, chunks, bucket + place, touches)
            if ACCUMULATE:
                score += tl.load(touched, mask=touches, other=0)
            tl.store(touched, score, mask=touches)
        first += tl.num_programs(0).to(tl.int64) * TILE


def find(
    view: GroupView,
    batch: Union[UniqueKeys, KeyBatch],
    scores: Optional[Scores],
    accumulate: bool,
    status: Optional[torch.Tensor],
) -> torch.Tensor:
    keys = aligned(batch.keys)
    slots = torch.empty_like(keys)
    piece = min(view.bucket_capacity, _PIECE)
    tile = _PIECES_PER_PROGRAM * piece // view.bucket_capacity
    programs = grid_stride_programs(triton.cdiv(keys.numel(), tile), keys, _OPTIONS)
    # Stand for what is not there.
    count, total = (batch.count, -1) if isinstance(batch, UniqueKeys) else (keys, keys.numel())
    given = Scores(keys) if scores is None else scores
    if status is None:
        status = torch.empty(keys.shape, dtype=torch.int8, device=keys.device)
    launch(
        _find_kernel, programs, view.addresses, view.geometry, count, keys, aligned(batch.tables),
        aligned(given.numbers), slots, status, int(given.source), total, view.addresses.shape[1], view.world_size,
        CAPACITY=view.bucket_capacity, TILE=tile, PIECE=piece, TOUCH=scores is not None, ACCUMULATE=accumulate,
        options=_OPTIONS,
    )  # fmt: skip
    return slots
