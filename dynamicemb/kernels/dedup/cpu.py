"""Deduplication on the CPU: tables are sorted one by one, long ones after they have been divided into ranges.

A **segment** is what one thread sorts: the keys of a table, or those of one range of mixed keys of a long table. It
stays in the caches of a core meanwhile; :mod:`~dynamicemb.kernels.dedup.words_cpu` says how it is sorted. A **run** is
what stays together in the result: a segment or, where several ranks share several tables, the part of a segment that
one of them owns. Each segment and each run has its own places in all arrays, so that nothing depends on which thread
works on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.dedup.words_cpu import (
    HEAD,
    MAX_CELL_BITS,
    bit_length,
    clear,
    make_words,
    mark_entries,
    settle,
    sort_words,
)
from dynamicemb.kernels.hashing.cpu import mix
from dynamicemb.kernels.numba_support import (
    as_uint32,
    inline,
    kernel,
    mulhi64,
    parallel_for,
    prefetch_to_write,
    stack_bytes,
)
from dynamicemb.kernels.views import UniqueKeys

# A table with more keys is divided into ranges of 512 to 1024 keys, which fit into the first-level cache with all that
# is made of them; but into 2048 ranges at most, whose ends, where it is written, fit into the second-level cache.
_UNDIVIDED_KEYS = 1 << 14
_KEYS_OF_RANGE_BITS, _MAX_DIVIDE_BITS = 10, 11
# It is read in pieces, which several threads can work on.
_MIN_KEYS_OF_PIECE, _MAX_PIECES = 1 << 13, 32
# 200 to 300 microseconds of work. What is handed over begins 60 microseconds later, and all that it reads and writes
# has to go from one core's cache to the other's and back.
_MIN_PIECES_PER_THREAD, _MIN_WORDS_TO_SORT, _MIN_WORDS_TO_WRITE = 16, 1 << 16, 1 << 16
_CELL_BYTES = 4 << MAX_CELL_BITS
_0, _1, _63, _64 = np.uint64(0), np.uint64(1), np.uint64(63), np.uint64(64)

# Columns of the plan, int64: of tables; there is a row more than tables.
_FIRST_PIECE, _FIRST_SEGMENT, _FIRST_WORD, _DIVIDE_BITS = 0, 1, 2, 3
# Of pieces: a range of positions, its first word, its table, and where its counters begin if the table is divided.
_FROM, _TO, _WORD_OF_PIECE, _TABLE_OF_PIECE, _COUNTERS = 0, 1, 2, 3, 4
# Of segments; there is a row more than segments.
_SEGMENT_WORD, _TABLE_OF_SEGMENT, _FIRST_RUN = 0, 1, 2
# Of runs; there is a row more than runs. The last two say where in the result it begins.
_RUN_WORD, _TABLE_OF_RUN, _OWNER, _ENTRIES, _PLACE, _ENTRY = 0, 1, 2, 3, 4, 5


# ------------------------------------------------------------------------------------------------ plan


@kernel
def _plan(lengths, ends, tables, pieces):
    """Lays out tables and pieces; returns how many counters the tables need that are to be divided.

    ``lengths`` [senders, tables] are those of the parts in which the keys arrive, ``ends`` where each part ends.
    """
    senders, num_tables = lengths.shape
    piece = segment = word = counters = 0
    for table in range(num_tables):
        total = 0
        for sender in range(senders):
            total += lengths[sender, table]
        bits, longest = 0, max(total, 1)
        if total > _UNDIVIDED_KEYS:
            bits = min(bit_length(total - 1) - _KEYS_OF_RANGE_BITS, _MAX_DIVIDE_BITS)
            longest = max(_MIN_KEYS_OF_PIECE, -(-total // _MAX_PIECES))
        tables[table, _FIRST_PIECE], tables[table, _FIRST_SEGMENT] = piece, segment
        tables[table, _FIRST_WORD], tables[table, _DIVIDE_BITS] = word, bits
        for sender in range(senders):
            stop = ends[sender, table]
            for first in range(stop - lengths[sender, table], stop, longest):
                last = min(first + longest, stop)
                pieces[piece, _FROM], pieces[piece, _TO], pieces[piece, _WORD_OF_PIECE] = first, last, word
                pieces[piece, _TABLE_OF_PIECE], pieces[piece, _COUNTERS] = table, counters
                word += last - first
                piece += 1
                if bits > 0:
                    counters += 1 << bits
        segment += 1 << bits
    tables[num_tables, _FIRST_PIECE], tables[num_tables, _FIRST_SEGMENT] = piece, segment
    tables[num_tables, _FIRST_WORD] = word
    return counters


@kernel
def _lay_out_segments(tables, pieces, counters, owners, segments):
    """Lays out the segments, and a run for each owner that a segment may have; returns the number of runs.

    Counters change from how many keys a piece has in a range to where the first of them goes.
    """
    num_tables, runs = tables.shape[0] - 1, 0
    for table in range(num_tables):
        word, bits = tables[table, _FIRST_WORD], tables[table, _DIVIDE_BITS]
        for part in range(1 << bits):
            segment, first_word = tables[table, _FIRST_SEGMENT] + part, word
            if bits == 0:
                word = tables[table + 1, _FIRST_WORD]
            else:
                for piece in range(tables[table, _FIRST_PIECE], tables[table + 1, _FIRST_PIECE]):
                    counter = pieces[piece, _COUNTERS] + part
                    count = counters[counter]
                    counters[counter] = word
                    word += count
            segments[segment, _SEGMENT_WORD], segments[segment, _TABLE_OF_SEGMENT] = first_word, table
            segments[segment, _FIRST_RUN] = runs
            runs += min(owners, word - first_word)
    last = tables[num_tables, _FIRST_SEGMENT]
    segments[last, _SEGMENT_WORD], segments[last, _FIRST_RUN] = tables[num_tables, _FIRST_WORD], runs
    return runs


# ------------------------------------------------------------------------------------------------ segments


@inline
def _counters_of(pieces, piece, tables):
    """Where a piece's counters begin, and how many bits they tell apart; 0 if its table is not divided."""
    bits = np.uint64(tables[pieces[piece, _TABLE_OF_PIECE], _DIVIDE_BITS])
    return np.uint64(pieces[piece, _COUNTERS]), bits


@kernel
def _count_ranges(first_piece, last_piece, tables, pieces, keys, counters, mixed, divided_keys, positions):
    """Mixes the keys of divided tables, and counts those of each range.

    Asks for the memory to which :func:`_divide` will write in no order that a processor could foresee: between two
    steps of training, most of it has left the caches.
    """
    for piece in range(first_piece, last_piece):
        counter, bits = _counters_of(pieces, piece, tables)
        if bits == _0:
            continue
        first, stop = np.uint64(pieces[piece, _FROM]), np.uint64(pieces[piece, _TO])
        size, word = pieces[piece, _TO] - pieces[piece, _FROM], pieces[piece, _WORD_OF_PIECE]
        prefetch_to_write(np.int64(divided_keys.ctypes.data) + word * 8, size * 8)
        prefetch_to_write(np.int64(positions.ctypes.data) + word * 4, size * 4)
        for i in range(first, stop):
            mixed[i] = mix(keys[i])
        clear(counters, counter, counter + (_1 << bits))
        for i in range(first, stop):
            counters[counter + (mixed[i] >> (_64 - bits))] += _1


@kernel
def _divide(first_piece, last_piece, tables, pieces, keys, mixed, counters, divided_keys, positions):
    """Writes the keys of divided tables to their ranges, and their positions beside them."""
    for piece in range(first_piece, last_piece):
        counter, bits = _counters_of(pieces, piece, tables)
        if bits == _0:
            continue
        for i in range(np.uint64(pieces[piece, _FROM]), np.uint64(pieces[piece, _TO])):
            at = counter + (mixed[i] >> (_64 - bits))
            place = counters[at]
            divided_keys[place], positions[place] = keys[i], i
            counters[at] = place + _1


@inline
def _first_at(rows, column, word):
    """The first row that does not begin before ``word``; the column ascends."""
    first, last = 0, rows.shape[0]
    while first < last:
        middle = (first + last) // 2
        if rows[middle, column] < word:
            first = middle + 1
        else:
            last = middle
    return first


@inline
def _find_runs(first, stop, world_size, sorted_keys, marked, runs, run):
    """Begins a run for each owner of a key of the segment, from row ``run`` on; returns the row after the last."""
    owner = np.int64(-1)
    run -= 1
    for i in range(first, stop):
        if marked[i] & HEAD == _0:
            continue
        owner_here = np.int64(mulhi64(mix(sorted_keys[i]), world_size))
        if owner_here != owner:
            owner = owner_here
            run += 1
            runs[run, _RUN_WORD], runs[run, _OWNER], runs[run, _ENTRIES] = i, owner, 0
        runs[run, _ENTRIES] += 1
    return run + 1


@kernel
def _sort(start, end, tables, pieces, segments, keys, divided_keys, positions, low_bits, owners, spare, words, runs):
    """Sorts the segments that begin between ``start`` and ``end``; leaves keys in ``words`` and positions in ``spare``,
    as :func:`mark_entries` says."""
    low_mask = (_1 << low_bits) - _1
    cells = as_uint32(stack_bytes(_CELL_BYTES))
    no_positions = positions[:0]
    segment = _first_at(segments, _SEGMENT_WORD, start)
    while segment < segments.shape[0] - 1 and segments[segment, _SEGMENT_WORD] < end:
        table = segments[segment, _TABLE_OF_SEGMENT]
        first_run, last_run = segments[segment, _FIRST_RUN], segments[segment + 1, _FIRST_RUN]
        first, stop = np.uint64(segments[segment, _SEGMENT_WORD]), np.uint64(segments[segment + 1, _SEGMENT_WORD])
        segment += 1
        if first == stop:
            continue
        divide_bits = tables[table, _DIVIDE_BITS]
        if divide_bits > 0:
            keys_here, positions_here = divided_keys, positions
            make_words(first, stop, divided_keys, low_mask, first, spare)
        else:
            keys_here, positions_here = keys, no_positions
            for piece in range(tables[table, _FIRST_PIECE], tables[table + 1, _FIRST_PIECE]):
                at = pieces[piece, _WORD_OF_PIECE]
                make_words(pieces[piece, _FROM], pieces[piece, _TO], keys, low_mask, at, spare)
        sort_words(spare, first, stop, divide_bits, cells, words)
        entries, unsettled = mark_entries(first, stop, keys_here, positions_here, low_mask, words, spare)
        if unsettled:
            settle(first, stop, low_bits, words, spare)
            entries, unsettled = mark_entries(first, stop, keys, no_positions, low_mask, words, spare)
        run = first_run
        if owners > _1:
            run = _find_runs(first, stop, owners, words, spare, runs, run)
        else:
            runs[run, _RUN_WORD], runs[run, _ENTRIES] = first, entries
            run += 1
        for unused in range(run, last_run):
            runs[unused, _RUN_WORD], runs[unused, _OWNER], runs[unused, _ENTRIES] = stop, 0, 0
        for run in range(first_run, last_run):
            runs[run, _TABLE_OF_RUN] = table


# ------------------------------------------------------------------------------------------------ results


@kernel
def _place_runs(runs, order):
    """Where each run begins in the result, whose runs are in the given order; returns the number of entries."""
    place = entry = 0
    for i in range(runs.shape[0] - 1):
        run = order[i] if order.size > 0 else i
        runs[run, _PLACE], runs[run, _ENTRY] = place, entry
        place += runs[run + 1, _RUN_WORD] - runs[run, _RUN_WORD]
        entry += runs[run, _ENTRIES]
    return entry


@kernel
def _write(start, end, runs, sorted_keys, marked, unique_keys, unique_tables, inverse, order, offsets):
    """Writes the runs that begin between ``start`` and ``end``, without a branch for where a key comes first."""
    if start == 0:
        offsets[0] = 0
    prefetch_to_write(np.int64(inverse.ctypes.data) + start * 8, (end - start) * 8)  # written to in any order
    run = _first_at(runs, _RUN_WORD, start)
    while run < runs.shape[0] - 1 and runs[run, _RUN_WORD] < end:
        place, first_entry, table = np.uint64(runs[run, _PLACE]), np.uint64(runs[run, _ENTRY]), runs[run, _TABLE_OF_RUN]
        entry = first_entry - _1
        for i in range(np.uint64(runs[run, _RUN_WORD]), np.uint64(runs[run + 1, _RUN_WORD])):
            position = marked[i] & ~HEAD
            entry += marked[i] >> _63
            order[place] = position
            place += _1
            inverse[position] = entry
            unique_keys[entry] = sorted_keys[i]
            offsets[entry + _1] = place  # the last of the entry's stays
        for other in range(first_entry, entry + _1):
            unique_tables[other] = table
        run += 1


class _Scratch(threading.local):
    """Memory that a thread's next batch uses again: fresh pages cost more than the sort of what is written to them."""

    def __init__(self) -> None:
        self._words = np.empty((2, 0), np.uint64)
        self._divided = np.empty(0, np.int64), np.empty(0, np.uint32)

    def words(self, size: int) -> np.ndarray:
        """uint64 [2, size], undefined."""
        if self._words.shape[1] < size:
            self._words = np.empty((2, size + size // 4), np.uint64)
        return self._words[:, :size]

    def divided(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [size] and uint32 [size], undefined."""
        if self._divided[0].size < size:
            self._divided = np.empty(size + size // 4, np.int64), np.empty(size + size // 4, np.uint32)
        keys, positions = self._divided
        return keys[:size], positions[:size]


_scratch = _Scratch()


def dedup(
    keys: torch.Tensor,
    tables: torch.Tensor,
    num_tables: int,
    world_size: int,
    lengths_by_table: Optional[Sequence[Sequence[int]]],
) -> UniqueKeys:
    if lengths_by_table is not None:
        lengths = np.array(lengths_by_table, np.int64)
        assert lengths.sum() == keys.numel(), f"{lengths.sum()} keys by their lengths, {keys.numel()} in the batch"
        return _dedup(keys, lengths, world_size)
    if num_tables == 1:
        return _dedup(keys, np.array([[keys.numel()]]), world_size)
    # Put in order, and tables numbered anew, since there may be more of them than keys.
    present, lengths = np.unique(tables.numpy(), return_counts=True)
    by_table = torch.from_numpy(tables.numpy().argsort(kind="stable"))
    unique = _dedup(keys[by_table], lengths[None], world_size)
    inverse = torch.empty_like(unique.inverse)
    inverse[by_table] = unique.inverse
    return dataclasses.replace(
        unique, tables=torch.from_numpy(present)[unique.tables], inverse=inverse, order=by_table[unique.order]
    )


def _dedup(keys: torch.Tensor, lengths: np.ndarray, world_size: int) -> UniqueKeys:
    n = keys.numel()
    runs, run_order, sorted_keys, marked = _sorted_runs(keys.numpy(), lengths, world_size)
    entries = _place_runs(runs, run_order)
    # One block: what is returned lives and dies together, and memory of several would go back to the system when the
    # batch is let go of, which costs page faults. By NumPy, which takes a fifth of the time that torch does.
    sizes = (n, n, entries, entries + 1, -(-entries // 2))
    ends = list(itertools.accumulate(sizes))
    memory = np.empty(ends[-1], np.int64)
    inverse, order, unique_keys, offsets, tables = (
        memory[end - size : end] for end, size in zip(ends, sizes, strict=True)
    )
    unique_tables = tables.view(np.int32)[:entries]
    parallel_for(
        _write, n, runs, sorted_keys, marked, unique_keys, unique_tables, inverse, order, offsets,
        min_items=_MIN_WORDS_TO_WRITE,
    )  # fmt: skip
    count = np.array([entries], np.int64)
    return UniqueKeys(*map(torch.from_numpy, (unique_keys, unique_tables, inverse, order, offsets, count)))


def _sorted_runs(
    keys: np.ndarray, lengths: np.ndarray, world_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The runs as they lie in memory; their order in the result, if that is another; and the sorted keys with their
    positions, see :func:`mark_entries`."""
    n, (senders, num_tables) = keys.size, lengths.shape
    # Owners are ranges of mixed keys: only where each has several tables are they told apart.
    owners = world_size if num_tables > 1 else 1
    tables = np.empty((num_tables + 1, 4), np.int64)
    pieces = np.empty((senders * num_tables + n // _MIN_KEYS_OF_PIECE, 5), np.int64)
    counters = np.empty(_plan(lengths, lengths.cumsum().reshape(lengths.shape), tables, pieces), np.uint64)
    num_pieces, num_segments = int(tables[-1, _FIRST_PIECE]), int(tables[-1, _FIRST_SEGMENT])
    low_bits = np.uint64(max(n - 1, 0).bit_length())
    spare, words = _scratch.words(n)
    divided_keys, positions = _scratch.divided(n if counters.size > 0 else 0)
    if counters.size > 0:
        parallel_for(
            _count_ranges, num_pieces, tables, pieces, keys, counters, words, divided_keys, positions,
            min_items=_MIN_PIECES_PER_THREAD,
        )  # fmt: skip
    segments = np.empty((num_segments + 1, 3), np.int64)
    runs = np.empty((_lay_out_segments(tables, pieces, counters, owners, segments) + 1, 6), np.int64)
    runs[-1, _RUN_WORD] = n
    if counters.size > 0:
        parallel_for(
            _divide, num_pieces, tables, pieces, keys, words, counters, divided_keys, positions,
            min_items=_MIN_PIECES_PER_THREAD,
        )  # fmt: skip
    parallel_for(
        _sort, n, tables, pieces, segments, keys, divided_keys, positions, low_bits, np.uint64(owners), spare, words,
        runs, min_items=_MIN_WORDS_TO_SORT,
    )  # fmt: skip
    if owners == 1:
        return runs, np.empty(0, np.int64), words, spare
    return runs, np.lexsort((runs[:-1, _TABLE_OF_RUN], runs[:-1, _OWNER])), words, spare
