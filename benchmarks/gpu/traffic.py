"""Bytes that each kernel has to move, as a function of the batch and the layout. Reads no clock and no device.

=========  ==================================================================
N          ids of the batch
U          distinct ones among them, of all tables together
M          of those, how many are absent before the step
row bytes  of a row with its optimizer state, ``RowLayout.row_bytes``
=========  ==================================================================

What is counted: every input that has to be read and every output that has to be written, once. A row that several ids
of a batch share is read once, because the cache has it for the others. What is walked in order, and rows of more than
128 bytes, are *streamed*: memory gives them at the speed of a copy. What remains are *random accesses* to one to four
sectors of 32 bytes, of which memory does so many a second and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, RowLayout
from dynamicemb.kernels.segment_sum import BLOCK_ROWS

__all__ = [
    "SECTOR_BYTES",
    "SortWork",
    "Traffic",
    "backward",
    "begin_update",
    "dedup",
    "dedup_compare",
    "dedup_number",
    "dedup_prefix",
    "evaluation",
    "fill",
    "fill_missing",
    "find",
    "find_repeated",
    "forward",
    "gather",
    "gather_rows",
    "insert",
    "rows_read",
    "sort",
    "static_backward",
    "static_forward",
    "tally",
    "touched_buckets",
    "update",
]

#: The least that memory reads or writes.
SECTOR_BYTES = 32
#: Above this width, random places cost what neighbouring ones do.
MOST_RANDOM_BYTES = 128
KEY_BYTES = SLOT_BYTES = SCORE_BYTES = OFFSET_BYTES = POSITION_BYTES = 8
TABLE_BYTES = PREFIX_BYTES = 4
STATUS_BYTES = MARK_BYTES = 1
FLOAT_BYTES = 4
OUTCOMES = 4
#: Values of a digest: 0 means empty.
DIGEST_VALUES = 255
RADIX_BITS = 8

assert METADATA_BYTES_PER_SLOT == 1 + KEY_BYTES + SCORE_BYTES


@dataclass(frozen=True)
class SortWork:
    """A radix sort of ``count`` pairs, eight bits of the key in each pass."""

    count: float
    key_bytes: int
    value_bytes: int

    @property
    def num_bytes(self) -> float:
        """The keys once to count digits, then keys and values read and written in each pass."""
        passes = self.key_bytes * 8 // RADIX_BITS
        return self.count * (self.key_bytes + passes * 2 * (self.key_bytes + self.value_bytes))


@dataclass(frozen=True)
class Traffic:
    """What a piece of work asks of memory.

    Attributes:
        streamed_bytes: read and written at the speed of a copy.
        accesses: number of random accesses, by their width in bytes.
        sorts: that are part of it.
    """

    streamed_bytes: float = 0.0
    accesses: Mapping[int, float] = field(default_factory=dict)
    sorts: tuple[SortWork, ...] = ()

    @property
    def num_bytes(self) -> float:
        """All of it."""
        random = sum(width * count for width, count in self.accesses.items())
        return self.streamed_bytes + random + sum(work.num_bytes for work in self.sorts)

    def __add__(self, other: Traffic) -> Traffic:
        widths = sorted({*self.accesses, *other.accesses})
        accesses = {width: self.accesses.get(width, 0.0) + other.accesses.get(width, 0.0) for width in widths}
        return Traffic(self.streamed_bytes + other.streamed_bytes, accesses, (*self.sorts, *other.sorts))


def rows_read(count: float, num_bytes: int) -> Traffic:
    """``count`` rows at random places, of which ``num_bytes`` are read, or written."""
    whole = -(-num_bytes // SECTOR_BYTES) * SECTOR_BYTES
    return Traffic(accesses={whole: count}) if whole <= MOST_RANDOM_BYTES else Traffic(count * whole)


def _twice(traffic: Traffic) -> Traffic:
    """Read and written back."""
    return traffic + traffic


def touched_buckets(keys: float, buckets: float) -> float:
    """How many of ``buckets`` are the bucket of at least one of ``keys`` distinct keys, on average."""
    return buckets * -math.expm1(-keys / buckets)


def sort(count: float, key_bytes: int = PREFIX_BYTES, value_bytes: int = POSITION_BYTES) -> Traffic:
    """One sort of keys with positions; by default of the prefixes that :func:`dedup` makes."""
    return Traffic(sorts=(SortWork(count, key_bytes, value_bytes),))


def dedup_prefix(ids: float) -> Traffic:
    """Keys and tables in, prefixes out."""
    return Traffic(ids * (KEY_BYTES + TABLE_BYTES + PREFIX_BYTES))


def dedup_compare(ids: float) -> Traffic:
    """Sorted prefixes, positions and keys in, a mark for each out. Keys are read out of order, but the cache holds a
    batch of them."""
    return Traffic(ids * (PREFIX_BYTES + POSITION_BYTES + KEY_BYTES + MARK_BYTES))


def dedup_number(ids: float, unique: float) -> Traffic:
    """Positions and marks in, with key and table of each distinct id; inverse, tables and offsets of the length of the
    batch out, and the distinct keys."""
    read = ids * (POSITION_BYTES + MARK_BYTES) + unique * (KEY_BYTES + TABLE_BYTES)
    return Traffic(read + ids * (POSITION_BYTES + TABLE_BYTES + OFFSET_BYTES) + unique * KEY_BYTES)


def dedup(ids: float, unique: float) -> Traffic:
    """One sort of prefixes, and what comes before and after it."""
    return dedup_prefix(ids) + sort(ids) + dedup_compare(ids) + dedup_number(ids, unique)


def find(
    keys: float,
    hits: float,
    load: float,
    bucket_capacity: int = 128,
    touched: Optional[float] = None,
    touch: bool = False,
) -> Traffic:
    """Each key's digest line, the stored keys behind the digests that match, a slot out; with ``touch``, a score and a
    status.

    Args:
        keys: looked up.
        hits: of those that are there.
        load: share of the slots that are taken, from which false matches follow.
        bucket_capacity: bytes of a digest line.
        touched: distinct lines, where the keys come in the order of the buckets; None: every key reads its own.
        touch: scores are written, of a clock for each table.
    """
    lines = keys if touched is None else touched
    stored_keys = hits + keys * load * bucket_capacity / DIGEST_VALUES
    accesses = rows_read(lines, bucket_capacity) + rows_read(stored_keys, SECTOR_BYTES)
    streamed = keys * (KEY_BYTES + TABLE_BYTES + SLOT_BYTES)
    if touch:
        streamed += hits * STATUS_BYTES
        accesses += rows_read(hits, SECTOR_BYTES)
    return Traffic(streamed) + accesses


def insert(unique: float, misses: float, buckets: float, evicted: float = 0.0, bucket_capacity: int = 128) -> Traffic:
    """Slots of all keys looked through, keys hashed again; each bucket with a miss reads digests and scores; each key
    that is placed writes digest, key, score, slot and status, and hands on what it evicted."""
    streamed = unique * (KEY_BYTES + TABLE_BYTES + SLOT_BYTES)
    streamed += misses * (SLOT_BYTES + STATUS_BYTES) + evicted * (KEY_BYTES + SCORE_BYTES)
    lines = rows_read(touched_buckets(misses, buckets), bucket_capacity * (1 + SCORE_BYTES))
    return Traffic(streamed) + lines + rows_read(3 * misses + evicted, SECTOR_BYTES)


def fill(unique: float, misses: float, layout: RowLayout) -> Traffic:
    """All statuses read; for a new key its key, table and slot read and its row written, state included."""
    streamed = unique * STATUS_BYTES + misses * (KEY_BYTES + TABLE_BYTES + SLOT_BYTES)
    return Traffic(streamed) + rows_read(misses, layout.row_bytes)


def fill_missing(ids: float, missing: float, layout: RowLayout) -> Traffic:
    """All slots read; for a key that has none its key and table read and a row of float32 written."""
    streamed = ids * SLOT_BYTES + missing * (KEY_BYTES + TABLE_BYTES)
    return Traffic(streamed) + rows_read(missing, layout.dim * FLOAT_BYTES)


def tally(unique: float, tables: int) -> Traffic:
    """Statuses and tables read; the counters of each table are read and written."""
    return Traffic(unique * (STATUS_BYTES + TABLE_BYTES) + 2 * tables * OUTCOMES * 8)


def gather(ids: float, unique: float, layout: RowLayout, through_inverse: bool = True) -> Traffic:
    """Every distinct row read, without its state; one row of float32 written for each id."""
    indices = ids * POSITION_BYTES + unique * SLOT_BYTES if through_inverse else ids * SLOT_BYTES
    embedding_bytes = layout.dim * layout.embedding_dtype.itemsize
    return Traffic(indices + ids * layout.dim * FLOAT_BYTES) + rows_read(unique, embedding_bytes)


def gather_rows(ids: float, unique: float, row_bytes: int) -> Traffic:
    """Every distinct row of a tensor read, and one written for each id, in the same dtype."""
    return Traffic(ids * (POSITION_BYTES + row_bytes)) + rows_read(unique, row_bytes)


def begin_update(ids: float) -> Traffic:
    """For each so many positions the entry of the last one, and where it begins and ends; the gradients that belong to
    whole blocks are those that the update need not read."""
    return rows_read(3 * ids / BLOCK_ROWS, SECTOR_BYTES)


def update(ids: float, unique: float, layout: RowLayout, gradient_bytes: int = FLOAT_BYTES) -> Traffic:
    """Every gradient read once, in the order of the keys; every distinct row read and written, state included."""
    indices = ids * POSITION_BYTES + unique * (OFFSET_BYTES + SLOT_BYTES + TABLE_BYTES)
    gradients = rows_read(ids, layout.dim * gradient_bytes)
    return Traffic(indices) + gradients + _twice(rows_read(unique, layout.row_bytes))


def forward(
    ids: float, unique: float, misses: float, layout: RowLayout, tables: int, buckets: float, load: float,
    bucket_capacity: int = 128,
) -> Traffic:  # fmt: skip
    """A training lookup: dedup, find with touch, insert, fill, tally, gather.

    Args:
        ids, unique, misses: of the batch.
        layout: of the rows.
        tables: in the group.
        buckets: of all tables together.
        load: share of the slots that are taken.
        bucket_capacity: slots of a bucket.
    """
    lines = touched_buckets(unique, buckets)
    return (
        dedup(ids, unique)
        + find(unique, unique - misses, load, bucket_capacity, lines, touch=True)
        + insert(unique, misses, buckets, bucket_capacity=bucket_capacity)
        + fill(unique, misses, layout)
        + tally(unique, tables)
        + gather(ids, unique, layout)
    )


def backward(ids: float, unique: float, layout: RowLayout) -> Traffic:
    """The update, which is all there is to do."""
    return begin_update(ids) + update(ids, unique, layout)


def find_repeated(ids: float, unique: float, load: float, bucket_capacity: int = 128) -> Traffic:
    """Find for ids in any order, all of them there, equal ones among them: those read the same line and key, which the
    cache then has."""
    repeated = Traffic((ids - unique) * (KEY_BYTES + TABLE_BYTES + SLOT_BYTES))
    return repeated + find(unique, unique, load, bucket_capacity)


def evaluation(ids: float, unique: float, layout: RowLayout, load: float, bucket_capacity: int = 128) -> Traffic:
    """Find and gather without dedup. With an initializer, :func:`fill_missing` comes on top."""
    return find_repeated(ids, unique, load, bucket_capacity) + gather(ids, unique, layout, through_inverse=False)


def static_forward(ids: float, unique: float, layout: RowLayout) -> Traffic:
    """The lookup of a static table: index and offset of each id, every distinct row read, one row written for each."""
    return Traffic(ids * POSITION_BYTES) + gather(ids, unique, layout, through_inverse=False)


def static_backward(ids: float, unique: float, layout: RowLayout) -> Traffic:
    """The update of a static table: it sorts on the way back, by the four bytes that numbers of rows have, and then
    does what :func:`update` does."""
    return sort(ids) + update(ids, unique, layout)
