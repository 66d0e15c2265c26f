"""Deduplication on the CPU: a radix sort of positions by the top bits of their mixed keys, then neighbour compares.

Mixed keys are as good as random, so 22 bits leave few different keys side by side; a last walk settles those.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import mix
from dynamicemb.kernels.numba_support import inline, kernel, mulhi64, parallel_for
from dynamicemb.kernels.views import UniqueKeys

# 11 bits: the 2048 counters of a pass stay in the first-level cache.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
# What two passes sort by. A third would cost more than the settling of neighbours saves, up to millions of keys.
_SORTED_BITS = 2 * _DIGIT_BITS
_UNSORTED_BITS = np.uint64(64 - _SORTED_BITS)
_DIGIT_MASK, _DIGIT_BITS_U, _0 = np.uint64(_DIGITS - 1), np.uint64(_DIGIT_BITS), np.uint64(0)
# Mixing takes about 3 ns a key.
_MIN_KEYS_PER_THREAD = 1 << 17
# Runs of equal top bits up to this length are settled by insertion, longer ones by merging.
_MAX_INSERTION_RUN = 32


@kernel
def _mix_and_group(start, stop, keys, tables, num_tables, world_size, mixed, groups):
    for i in range(start, stop):
        h = mix(keys[i])
        mixed[i] = h
        if groups.size > 0:
            groups[i] = np.uint64(mulhi64(h, world_size) * num_tables + np.uint64(tables[i]))


@inline
def _first_places(counts):
    """From how often each digit occurs to where its first position goes."""
    total = 0
    for digit in range(counts.size):
        count = counts[digit]
        counts[digit] = total
        total += count


@kernel
def _sort_by_top_bits(mixed, digits, spare, order):
    """``order`` = all positions, sorted stably by the top 22 bits of ``mixed``; the rest is scratch."""
    counts = np.zeros((2, _DIGITS), np.int64)
    for i in range(mixed.size):
        top = mixed[i] >> _UNSORTED_BITS
        counts[0, top & _DIGIT_MASK] += 1
        counts[1, top >> _DIGIT_BITS_U] += 1
    _first_places(counts[0])
    _first_places(counts[1])
    for i in range(mixed.size):
        top = mixed[i] >> _UNSORTED_BITS
        digit = top & _DIGIT_MASK
        place = counts[0, digit]
        counts[0, digit] = place + 1
        spare[place] = i
        digits[place] = top >> _DIGIT_BITS_U  # carried along: the next pass would have to look it up at random
    for i in range(mixed.size):
        digit = digits[i]
        order[counts[1, digit]] = spare[i]
        counts[1, digit] += 1


@kernel
def _sort_by_groups(groups, bits, spare, order):
    """Sorts ``order`` stably by the low ``bits`` bits of ``groups``."""
    counts = np.empty(_DIGITS, np.int64)
    for shift in range(0, bits, _DIGIT_BITS):
        counts[:] = 0
        for i in range(groups.size):
            counts[(groups[i] >> np.uint64(shift)) & _DIGIT_MASK] += 1
        _first_places(counts)
        for i in range(groups.size):
            position = order[i]
            digit = (groups[position] >> np.uint64(shift)) & _DIGIT_MASK
            spare[counts[digit]] = position
            counts[digit] += 1
        order[:] = spare


@inline
def _settle_run(run, mixed):
    """Sorts the positions of ``run``, whose top bits are equal, stably by the whole mixed key."""
    if run.size > _MAX_INSERTION_RUN:
        keys = np.empty(run.size, np.uint64)
        for i in range(run.size):
            keys[i] = mixed[run[i]]
        run[:] = run[np.argsort(keys, kind="mergesort")]
        return
    for i in range(1, run.size):
        position = run[i]
        key = mixed[position]
        hole = i
        while hole > 0 and mixed[run[hole - 1]] > key:
            run[hole] = run[hole - 1]
            hole -= 1
        run[hole] = position


@kernel
def _settle(order, mixed, groups, sorted_mixed):
    """Finishes the sort by (group, top bits), and stores the mixed keys in their order."""
    for i in range(order.size):
        sorted_mixed[i] = mixed[order[i]]
    i = 1
    while i < order.size:
        # Descending although the top bits are equal, which is rare: back to where the run begins, and on to its end.
        if sorted_mixed[i - 1] <= sorted_mixed[i] or (sorted_mixed[i - 1] ^ sorted_mixed[i]) >> _UNSORTED_BITS != _0:
            i += 1
            continue
        if groups.size > 0 and groups[order[i - 1]] != groups[order[i]]:
            i += 1
            continue
        first, last = i - 1, i + 1
        while first > 0 and _same_run(first - 1, i, order, groups, sorted_mixed):
            first -= 1
        while last < order.size and _same_run(last, i, order, groups, sorted_mixed):
            last += 1
        _settle_run(order[first:last], mixed)
        for j in range(first, last):
            sorted_mixed[j] = mixed[order[j]]
        i = last


@inline
def _same_run(i, j, order, groups, sorted_mixed):
    if (sorted_mixed[i] ^ sorted_mixed[j]) >> _UNSORTED_BITS != _0:
        return False
    return groups.size == 0 or groups[order[i]] == groups[order[j]]


@kernel
def _compact(order, sorted_mixed, groups, keys, tables, unique_keys, unique_tables, inverse, offsets):
    """Walks the sorted batch and writes an entry for each distinct (group, mixed key); returns their number."""
    entries = 0
    for i in range(order.size):
        position = order[i]
        new = i == 0 or sorted_mixed[i] != sorted_mixed[i - 1]
        if groups.size > 0 and not new:
            new = groups[position] != groups[order[i - 1]]
        if new:
            unique_keys[entries] = keys[position]
            unique_tables[entries] = tables[position]
            offsets[entries] = i
            entries += 1
        inverse[position] = entries - 1
    offsets[entries] = order.size
    return entries


class _Scratch(threading.local):
    """Memory that a thread's next batch uses again: fresh pages cost more than the sort of what is written to them."""

    def __init__(self) -> None:
        self._words = np.empty((4, 0), np.uint64)

    def take(self, size: int) -> np.ndarray:
        """uint64 [4, size], undefined."""
        if self._words.shape[1] < size:
            self._words = np.empty((4, size + size // 4), np.uint64)
        return self._words[:, :size]


_scratch = _Scratch()


def dedup(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> UniqueKeys:
    n = keys.numel()
    keys_array, tables_array = keys.numpy(), tables.numpy()
    mixed, groups, digits, spare = _scratch.take(n)
    if num_tables == 1:
        groups = groups[:0]  # sorting by the mixed key sorts by owner
    parallel_for(
        _mix_and_group, n, keys_array, tables_array, np.uint64(num_tables), np.uint64(world_size), mixed, groups,
        min_items=_MIN_KEYS_PER_THREAD,
    )  # fmt: skip
    order = torch.empty(n, dtype=torch.int64)
    _sort_by_top_bits(mixed, digits, spare.view(np.int64), order.numpy())
    if num_tables > 1:
        _sort_by_groups(groups, (num_tables * world_size - 1).bit_length(), spare.view(np.int64), order.numpy())
    sorted_mixed = digits
    _settle(order.numpy(), mixed, groups, sorted_mixed)
    unique_keys, unique_tables = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int32)
    inverse, offsets = torch.empty(n, dtype=torch.int64), torch.empty(n + 1, dtype=torch.int64)
    entries = _compact(
        order.numpy(), sorted_mixed, groups, keys_array, tables_array,
        unique_keys.numpy(), unique_tables.numpy(), inverse.numpy(), offsets.numpy(),
    )  # fmt: skip
    return UniqueKeys(
        unique_keys[:entries], unique_tables[:entries], inverse, order, offsets[: entries + 1], torch.tensor([entries])
    )
