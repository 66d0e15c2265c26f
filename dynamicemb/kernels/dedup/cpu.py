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
# Runs of equal top bits are settled by insertion in parts of this length, which are then merged.
_INSERTION_KEYS = 32


@kernel
def _mix_and_group(start, stop, keys, tables, num_tables, world_size, mixed, groups):
    for i in range(start, stop):
        h = mix(keys[i])
        mixed[i] = h
        if groups.size > 0:
            groups[i] = np.uint64(mulhi64(h, world_size) * num_tables + np.uint64(tables[i]))


@inline
def _clear(counts):
    for digit in range(counts.size):  # not counts[:] = 0, which takes Numba a second and a half to compile
        counts[digit] = 0


@inline
def _first_places(counts):
    """From how often each digit occurs to where its first position goes."""
    total = 0
    for digit in range(counts.size):
        count = counts[digit]
        counts[digit] = total
        total += count


@kernel
def _sort_by_top_bits(mixed, digits, spare, low, high, order):
    """``order`` = all positions, sorted stably by the top 22 bits of ``mixed``; the rest is scratch."""
    _clear(low)
    _clear(high)
    for i in range(mixed.size):
        top = mixed[i] >> _UNSORTED_BITS
        low[top & _DIGIT_MASK] += 1
        high[top >> _DIGIT_BITS_U] += 1
    _first_places(low)
    _first_places(high)
    for i in range(mixed.size):
        top = mixed[i] >> _UNSORTED_BITS
        digit = top & _DIGIT_MASK
        place = low[digit]
        low[digit] = place + 1
        spare[place] = i
        digits[place] = top >> _DIGIT_BITS_U  # carried along: the next pass would have to look it up at random
    for i in range(mixed.size):
        digit = digits[i]
        order[high[digit]] = spare[i]
        high[digit] += 1


@kernel
def _sort_by_groups(groups, bits, spare, counts, order):
    """Sorts ``order`` stably by the low ``bits`` bits of ``groups``."""
    for shift in range(0, bits, _DIGIT_BITS):
        _clear(counts)
        for i in range(groups.size):
            counts[(groups[i] >> np.uint64(shift)) & _DIGIT_MASK] += 1
        _first_places(counts)
        for i in range(groups.size):
            position = order[i]
            digit = (groups[position] >> np.uint64(shift)) & _DIGIT_MASK
            spare[counts[digit]] = position
            counts[digit] += 1
        for i in range(order.size):
            order[i] = spare[i]


@inline
def _settle_run(first, stop, order, spare, mixed):
    """Sorts the positions ``order[first:stop]``, whose top bits are equal, stably by the whole mixed key."""
    for start in range(first, stop, _INSERTION_KEYS):
        for i in range(start + 1, min(start + _INSERTION_KEYS, stop)):
            position = order[i]
            key = mixed[position]
            hole = i
            while hole > start and mixed[order[hole - 1]] > key:
                order[hole] = order[hole - 1]
                hole -= 1
            order[hole] = position
    width = _INSERTION_KEYS
    while width < stop - first:
        for start in range(first, stop, 2 * width):
            left, middle, end = start, min(start + width, stop), min(start + 2 * width, stop)
            right = middle
            for i in range(start, end):
                if right == end or (left < middle and mixed[order[left]] <= mixed[order[right]]):
                    spare[i] = order[left]
                    left += 1
                else:
                    spare[i] = order[right]
                    right += 1
        for i in range(first, stop):
            order[i] = spare[i]
        width *= 2


@kernel
def _settle(order, mixed, groups, spare, sorted_mixed):
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
        _settle_run(first, last, order, spare, mixed)
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
        self.counts = np.empty((2, _DIGITS), np.int64)

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
    places, (low, high) = spare.view(np.int64), _scratch.counts
    _sort_by_top_bits(mixed, digits, places, low, high, order.numpy())
    if num_tables > 1:
        _sort_by_groups(groups, (num_tables * world_size - 1).bit_length(), places, low, order.numpy())
    sorted_mixed = digits
    _settle(order.numpy(), mixed, groups, places, sorted_mixed)
    unique_keys, unique_tables = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int32)
    inverse, offsets = torch.empty(n, dtype=torch.int64), torch.empty(n + 1, dtype=torch.int64)
    entries = _compact(
        order.numpy(), sorted_mixed, groups, keys_array, tables_array,
        unique_keys.numpy(), unique_tables.numpy(), inverse.numpy(), offsets.numpy(),
    )  # fmt: skip
    return UniqueKeys(
        unique_keys[:entries], unique_tables[:entries], inverse, order, offsets[: entries + 1], torch.tensor([entries])
    )
