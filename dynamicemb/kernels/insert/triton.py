"""Insertion and eviction on the GPU. The keys of a bucket are neighbours in the batch; one program owns all of them.

A program is one warp. It owns the buckets whose first key, the head, lies in its tile; the keys of the last one may run
past it. If none is missing, a look at the slots is all. Otherwise it goes over the tile in windows of a key for each
lane, and takes those of the window's buckets that miss a key as rows of registers: 8 buckets of 128 slots. All rows'
digests are read at once, then the scores of full ones, and each round finds a place for every row's next missing key.

32 lanes hold 64 slots, two each, so a row has ``COLUMNS = 64 // ROWS`` columns and ``STRIPES = CAPACITY // COLUMNS``
stripes: place ``stripe * COLUMNS + column`` of the bucket, and a load of 128 bits for each lane and stripe. Minima over
stripes need no exchange between lanes. A set of places is an int32 [ROWS, COLUMNS] with a bit for each stripe.

No atomics: no other program touches the bucket or writes the entries of its keys. No barriers: nothing that this
program wrote is read again. Places that it filled are blocked, and what memory says about those is ignored.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.launch import LaunchOptions, grid_stride_programs, launch
from dynamicemb.kernels.triton_support import (
    aligned,
    bucket_slot,
    digest_of,
    digest_pointers,
    key_pointers,
    line_pointers,
    mix,
    score_of,
    score_pointers,
    table_of,
)
from dynamicemb.kernels.views import GroupView, KeyStatus, Scores, UniqueKeys

_INSERTED = tl.constexpr(int(KeyStatus.INSERTED))
_REPLACED = tl.constexpr(int(KeyStatus.REPLACED))
_REFUSED = tl.constexpr(int(KeyStatus.REFUSED))
_GREATEST_SCORE = tl.constexpr(2**63 - 1)

#: Keys of a window: one for each lane.
_WINDOW = tl.constexpr(32)
#: Instead of a place, for a key that needs none; and added to the place of a key that takes the slot of another.
_NOT_MISSING, _EVICTS = tl.constexpr(-2), tl.constexpr(512)

# Entries that a program looks at: those of a tile, and as many after it as a bucket has slots.
_LOOK = 256
_SLOTS_OF_ROWS = 1024  # 16 stripes
# 64 of the registers hold scores. 128 are enough for 16 warps on an SM; with as many, an A100 would keep up to four
# values in memory, so it has 12 warps.
_OPTIONS = LaunchOptions(num_warps=1, maxnreg=128, maxnreg_ampere=168)


@triton.jit
def _buckets_of(entry, left, keys, tables, geometry, world_size, CAPACITY: tl.constexpr):
    """Handle of the first slot of each entry's bucket; −1 before the batch, and for lanes from ``left`` on."""
    inside = (tl.arange(0, _WINDOW) < left) & (entry >= 0)
    mixed = mix(tl.load(keys + entry, mask=inside, other=0))
    table = tl.load(tables + entry, mask=inside, other=0)
    return tl.where(inside, bucket_slot(geometry, mixed, table, world_size, inside, CAPACITY), -1)


@triton.jit
def _marks(row, slot, CAPACITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The set of the slots of a window's keys, each in its row; none for row −1."""
    place = (slot & (CAPACITY - 1)).to(tl.int32)
    cell = row * COLUMNS + place % COLUMNS
    bit = tl.full([_WINDOW], 1, tl.int32) << (place // COLUMNS)
    cells = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    return tl.sum(tl.where(cell[:, None, None] == cells[None, :, :], bit[:, None, None], 0), axis=0)


@triton.jit
def _marks_of_bucket(
    bucket, entry, left, keys, tables, slots, geometry, world_size, CAPACITY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`_marks` of the keys of a bucket, all in row 0; ``entry`` is the first window that has any."""
    marks = tl.zeros([ROWS, COLUMNS], tl.int32)
    more = 1
    while more > 0:
        member = _buckets_of(entry, left, keys, tables, geometry, world_size, CAPACITY) == bucket
        slot = tl.load(slots + entry, mask=member, other=-1)
        marks += _marks(tl.where(slot >= 0, 0, -1), slot, CAPACITY, ROWS, COLUMNS)
        more = tl.max((member & (tl.arange(0, _WINDOW) == _WINDOW - 1)).to(tl.int32), axis=0)
        entry += _WINDOW
        left -= _WINDOW
    return marks


@triton.jit
def _has_empty(lines, mask, CAPACITY: tl.constexpr):
    """Whether any of the digest lines has an empty slot: 1 or 0."""
    lines = tl.multiple_of(lines.to(tl.pointer_type(tl.int32)), min(CAPACITY, 16))
    words = tl.load(lines[:, None] + tl.arange(0, CAPACITY // 4)[None, :], mask=mask[:, None], other=-1)
    # Not 0 exactly where one of the four bytes is: only a byte that is 0, or has a lower one that is, borrows.
    zero_bytes = (words - 0x01010101) & ~words & -0x7F7F7F80
    return tl.max((zero_bytes != 0).to(tl.int32))


@triton.jit
def _empty_slots(lines, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIPES: tl.constexpr):
    """The bits of the slots whose digest is 0. The lines are in the cache."""
    columns = tl.arange(0, COLUMNS)[None, :]
    empty = tl.zeros([ROWS, COLUMNS], tl.int32)
    for stripe in tl.static_range(STRIPES):
        digests = tl.load(lines[:, None] + (stripe * COLUMNS + columns), mask=mask[:, None], other=1)
        empty |= tl.where(digests == 0, 1 << stripe, 0)
    return empty


@triton.jit
def _number_of(bits):
    """How many of the lower 16 bits are set; the others are not."""
    bits -= (bits >> 1) & 0x5555
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def _stripe_of(bit):
    """The number of the only bit that is set."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # a power of two is exact in float32


@triton.jit
def _first_place(bits, CAPACITY: tl.constexpr, COLUMNS: tl.constexpr):
    """The first marked slot of each row; CAPACITY if there is none."""
    place = _stripe_of(bits & -bits) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.min(tl.where(bits != 0, place, CAPACITY), axis=1)


@triton.jit
def _victim(
    scores, blocked, scarce, addresses, chunks, here, CAPACITY: tl.constexpr, COLUMNS: tl.constexpr,
    STRIPES: tl.constexpr,
):  # fmt: skip
    """The slot with the least (score, key) of each ``scarce`` row that is not blocked; CAPACITY if there is none."""
    # The last stripe is compared in another way than the others, since LLVM packs the bits of 32 equal tests into words
    # and unpacks them again.
    least = tl.where(blocked < (1 << (STRIPES - 1)), scores[STRIPES - 1], _GREATEST_SCORE)
    for stripe in tl.static_range(STRIPES - 1):
        least = tl.where((blocked & (1 << stripe)) == 0, tl.minimum(least, scores[stripe]), least)
    least = tl.min(least, axis=1)[:, None]
    equals = tl.zeros([blocked.shape[0], COLUMNS], tl.int32)
    for stripe in tl.static_range(STRIPES):
        equals |= tl.where(scores[stripe] == least, 1 << stripe, 0)
    equals = tl.where(scarce[:, None], equals & ~blocked, 0)
    if tl.max(tl.sum(_number_of(equals), axis=1), axis=0) > 1:
        key_lines = key_pointers(addresses, chunks, here, tl.max(equals, axis=1) > 0)
        # Each lane goes through the keys of its equal slots, mostly one or none. All keys differ, so one slot is left.
        least_key = tl.full([blocked.shape[0], COLUMNS], 2**63 - 1, tl.int64)
        best = tl.zeros([blocked.shape[0], COLUMNS], tl.int32)
        while tl.max(equals) > 0:
            bit = equals & -equals
            place = _stripe_of(bit) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            key = tl.load(key_lines[:, None] + place, mask=bit != 0, other=2**63 - 1)
            better = (bit != 0) & (key <= least_key)
            least_key = tl.where(better, key, least_key)
            best = tl.where(better, bit, best)
            equals ^= bit
        equals = tl.where(least_key == tl.min(least_key, axis=1)[:, None], best, 0)
    return _first_place(equals, CAPACITY, COLUMNS)


@triton.jit
def _place_keys(
    addresses, chunks, bucket, slot, head, row, blocked, kept, CAPACITY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A place for each missing key of a window's rows (−1: none; plus _EVICTS if a key gives way), and ``blocked`` with
    these places. ``row`` is −1 for keys that are not served now. ``blocked`` has the found keys' places if ``kept``."""
    STRIPES: tl.constexpr = CAPACITY // COLUMNS
    ALL: tl.constexpr = (1 << STRIPES) - 1
    columns = tl.arange(0, COLUMNS)[None, :]
    missing = (row >= 0) & (slot < 0)
    # Missing keys are called by their order: those of a row are ``turn`` to ``last``. One sum tells each row how many
    # it has, the lane of its head, and how many come before.
    order = tl.cumsum(missing.to(tl.int32), 0)
    told = (missing.to(tl.int32) << 16) + tl.where(head, (tl.arange(0, _WINDOW) << 8) + order - missing.to(tl.int32), 0)
    order = tl.where(missing, order, 0)
    row_or_any = tl.maximum(row, 0)
    told = tl.sum(tl.where(row[:, None] == tl.arange(0, ROWS)[None, :], told[:, None], 0), axis=0)
    turn = (told & 255) + 1
    last = turn + (told >> 16) - 1
    here = tl.gather(bucket, (told >> 8) & 255, 0)
    blocked = tl.where(kept, blocked, 0)
    active = (turn <= last) & (tl.min(blocked, axis=1) != ALL)

    # Only where more keys are missing than slots are empty, scores and found keys matter.
    lines = line_pointers(addresses, chunks, here, active, CAPACITY)
    any_empty = _has_empty(lines, active, CAPACITY)
    empty = tl.zeros([ROWS, COLUMNS], tl.int32)
    if any_empty > 0:
        empty = _empty_slots(lines, active, ROWS, COLUMNS, STRIPES) & ~blocked
    scarce = active & (last - turn >= tl.sum(_number_of(empty), axis=1))
    any_scarce = tl.max(scarce.to(tl.int32), axis=0)
    row_of_found = tl.where(slot >= 0, row, -1)
    if (not kept) & (any_scarce > 0) & (tl.max(row_of_found, axis=0) >= 0):
        blocked = _marks(row_of_found, slot, CAPACITY, ROWS, COLUMNS)
    score_lines = score_pointers(addresses, chunks, here, scarce)
    scores = ()
    for stripe in tl.static_range(STRIPES):
        stripes = tl.multiple_of(score_lines[:, None] + (stripe * COLUMNS + columns), [1, 16])
        scores += (tl.load(stripes, mask=scarce[:, None], other=0),)  # type: ignore[assignment]

    # Each round finds a place for the next missing key of every row.
    chosen = tl.where(missing, -1, _NOT_MISSING)
    waiting = 1
    while waiting > 0:
        place = tl.full([ROWS], CAPACITY, tl.int32)
        if any_empty > 0:
            place = _first_place(empty & ~blocked, CAPACITY, COLUMNS)
        if any_scarce > 0:
            victim = _victim(scores, blocked, scarce, addresses, chunks, here, CAPACITY, COLUMNS, STRIPES)
            place = tl.where(place == CAPACITY, victim + _EVICTS, place)
        placed = active & (turn <= last) & ((place & (_EVICTS - 1)) < CAPACITY)
        ticket = tl.gather(tl.where(placed, (turn << 16) | place, 0), row_or_any, 0)
        called = ticket >> 16
        chosen = tl.where((called > 0) & (order == called), ticket & 0xFFFF, chosen)
        place = tl.where(placed, place & (CAPACITY - 1), CAPACITY)[:, None]
        blocked |= tl.where(place % COLUMNS == columns, (1 << (place // COLUMNS)) & ALL, 0)
        turn += 1
        waiting = tl.max(((called > 0) & (order > called)).to(tl.int32), axis=0)
    return chosen, blocked


@triton.jit
def _serve_tile(
    addresses, geometry, keys, tables, scores, slots, status, evicted_keys, evicted_scores, at, left, source, chunks,
    world_size, CAPACITY: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Inserts what is missing of buckets whose head is one of ``TILE`` entries from ``at``, ``left`` before the end."""
    COLUMNS: tl.constexpr = 64 // ROWS
    lanes = tl.arange(0, _WINDOW)
    blocked = tl.zeros([ROWS, COLUMNS], tl.int32)
    left_of_tile = tl.minimum(left, TILE)
    resumed = 0  # 1 if the window goes on with the bucket of the one before
    while (left_of_tile > 0) | (resumed > 0):
        # Number the buckets that begin in the window. Lane 0 has the key before it: served, or another program's.
        entry = at - 1 + lanes
        bucket = _buckets_of(entry, left + 1, keys, tables, geometry, world_size, CAPACITY)
        slot = tl.load(slots + entry, mask=bucket >= 0, other=0)
        head = (bucket >= 0) & (lanes > 0) & (bucket != tl.gather(bucket, tl.maximum(lanes - 1, 0), 0))
        resumed = tl.where(tl.max((head & (lanes == 1)).to(tl.int32), axis=0) > 0, 0, resumed)
        head |= (lanes == 1) & (resumed > 0)
        number = tl.cumsum(head.to(tl.int32), 0)

        # A bucket that the window may cut off is left to the next one, which begins with it. One that fills the window
        # from its first key on is long, and takes one window after the other for itself.
        cut = (left >= _WINDOW).to(tl.int32)
        own = tl.sum((head & (lanes <= left_of_tile)).to(tl.int32), axis=0)
        long = (cut > 0) & (tl.sum(tl.where(head, lanes, 0), axis=0) == 1) & (own + resumed > 0)
        kept = long | (resumed > 0)
        last_number = tl.where(kept, 1, tl.minimum(own, tl.max(number, axis=0) - cut))
        served = (bucket >= 0) & (number > 0) & (number <= last_number)
        first_number = tl.min(tl.where(served & (slot < 0), number, _WINDOW), axis=0)
        next_number = tl.minimum(first_number + ROWS, last_number + 1)
        done = tl.min(tl.where(head & (number == next_number), lanes, _WINDOW), axis=0) - 1
        if long & (resumed == 0):
            this = tl.max(tl.where(lanes == 1, bucket, -1), axis=0)
            blocked = _marks_of_bucket(
                this, entry, left + 1, keys, tables, slots, geometry, world_size, CAPACITY, ROWS, COLUMNS
            )
        at += done
        left -= done
        left_of_tile -= done
        resumed = long.to(tl.int32)

        if first_number <= last_number:
            row = tl.where(served & (number < first_number + ROWS), number - first_number, -1)
            chosen, blocked = _place_keys(
                addresses, chunks, bucket, slot, head, row, blocked, kept, CAPACITY, ROWS, COLUMNS
            )
            taken = chosen >= 0
            replaced = chosen >= _EVICTS
            slot = bucket + (chosen & (CAPACITY - 1))
            key_at = key_pointers(addresses, chunks, slot, taken)
            score_at = score_pointers(addresses, chunks, slot, taken)
            digest_at = digest_pointers(addresses, chunks, slot, taken)
            evicted_key = tl.load(key_at, mask=replaced, other=0)
            evicted_score = tl.load(score_at, mask=replaced, other=0)
            key = tl.load(keys + entry, mask=taken, other=0)
            tl.store(evicted_keys + entry, evicted_key, mask=replaced)
            tl.store(evicted_scores + entry, evicted_score, mask=replaced)
            tl.store(digest_at, digest_of(mix(key)), mask=taken)
            tl.store(key_at, key, mask=taken)
            tl.store(score_at, score_of(scores, source, entry, table_of(slot), taken), mask=taken)
            tl.store(slots + entry, slot, mask=taken)
            outcome = tl.where(taken, tl.where(replaced, _REPLACED, _INSERTED), _REFUSED)
            tl.store(status + entry, outcome.to(tl.int8), mask=chosen != _NOT_MISSING)


@triton.jit(do_not_specialize=["source", "chunks", "world_size"])
def _insert_kernel(
    addresses, geometry, count, keys, tables, scores, slots, status, evicted_keys, evicted_scores, source, chunks,
    world_size, CAPACITY: tl.constexpr, LOOK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LOOK - CAPACITY
    ahead = tl.arange(0, LOOK)
    begin = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(tl.load(count) - begin, 2**30).to(tl.int32)
    while left > 0:
        # Misses of the tile's buckets lie in it or among the CAPACITY keys after it: no bucket has more keys that were
        # found. One there may be another program's and get its slot meanwhile, which does not matter.
        slot = tl.load(slots + (begin + ahead), mask=ahead < left, other=0)
        if tl.max((slot < 0).to(tl.int32), axis=0) > 0:
            _serve_tile(
                addresses, geometry, keys, tables, scores, slots, status, evicted_keys, evicted_scores, begin,
                left, source, chunks, world_size, CAPACITY, ROWS, TILE,
            )  # fmt: skip
        begin += tl.num_programs(0).to(tl.int64) * TILE
        left = tl.minimum(tl.load(count) - begin, 2**30).to(tl.int32)


def insert(
    view: GroupView, unique: UniqueKeys, slots: torch.Tensor, scores: Scores, status: Optional[torch.Tensor]
) -> Insertion:
    entries, capacity = slots.numel(), view.bucket_capacity
    if status is None:  # the kernel has nothing to do for a key that is there
        status = torch.zeros(entries, dtype=torch.int8, device=slots.device)  # FOUND
    evicted_keys, evicted_scores = torch.empty_like(slots), torch.empty_like(slots)
    look = max(_LOOK, 2 * capacity)
    programs = grid_stride_programs(triton.cdiv(entries, look - capacity), slots, _OPTIONS)
    launch(
        _insert_kernel, programs, view.addresses, view.geometry, unique.count, unique.keys, unique.tables,
        aligned(scores.numbers), slots, status, evicted_keys, evicted_scores, int(scores.source),
        view.addresses.shape[1], view.world_size, CAPACITY=capacity, LOOK=look,
        ROWS=min(32, _SLOTS_OF_ROWS // capacity), options=_OPTIONS,
    )  # fmt: skip
    return Insertion(status, evicted_keys, evicted_scores)
