"""Deduplication on the CPU: a radix sort of positions by the top bits of their mixed keys, then neighbour compares.

Mixed keys are as good as random, so 22 bits leave few different keys side by side; a last walk settles those.
"""

from __future__ import annotations

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import mix
from dynamicemb.kernels.numba_support import inline, kernel, mulhi64, parallel_for
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, sum_rows
from dynamicemb.kernels.views import UniqueKeys

# 11 bits: the 2048 counters of a pass stay in the first-level cache.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
# What two passes sort by. A third would cost more than the settling of neighbours saves, up to millions of keys.
_SORTED_BITS = 2 * _DIGIT_BITS
_UNSORTED_BITS = np.uint64(64 - _SORTED_BITS)
# Runs of equal top bits up to this length are settled by insertion, longer ones by merging.
_MAX_INSERTION_RUN = 32


@kernel
def _mix_and_group(start, stop, keys, tables, num_tables, world_size, mixed, groups):
    for i in range(start, stop):
        h = mix(keys[i])
        mixed[i] = h
        groups[i] = np.uint64(mulhi64(h, world_size) * num_tables + np.uint64(tables[i]))


@kernel
def _radix_passes(digits_of, shift, stop, order, spare):
    """Sorts ``order`` stably by bits ``shift`` to ``stop`` of ``digits_of[order]``; whether it ended up in spare."""
    n = order.size
    flipped = False
    counts = np.empty(_DIGITS, np.int64)
    while shift < stop:
        source, target = (spare, order) if flipped else (order, spare)
        counts[:] = 0
        for i in range(n):
            counts[(digits_of[i] >> np.uint64(shift)) & np.uint64(_DIGITS - 1)] += 1
        if counts.max() < n:  # otherwise this digit is the same everywhere
            total = 0
            for digit in range(_DIGITS):
                count = counts[digit]
                counts[digit] = total
                total += count
            for i in range(n):
                position = source[i]
                digit = (digits_of[position] >> np.uint64(shift)) & np.uint64(_DIGITS - 1)
                target[counts[digit]] = position
                counts[digit] += 1
            flipped = not flipped
        shift += _DIGIT_BITS
    return flipped


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
def _settle(order, mixed, groups):
    """Finishes a sort by (group, top bits): puts different keys with the same top bits in order."""
    first = 0
    while first < order.size:
        top, group = mixed[order[first]] >> _UNSORTED_BITS, groups[order[first]]
        settled = True
        last = first + 1
        while last < order.size and mixed[order[last]] >> _UNSORTED_BITS == top and groups[order[last]] == group:
            settled &= mixed[order[last - 1]] <= mixed[order[last]]
            last += 1
        if not settled:
            _settle_run(order[first:last], mixed)
        first = last


@kernel
def _compact(order, mixed, groups, keys, tables, unique_keys, unique_tables, inverse, offsets):
    """Walks the sorted batch and writes one entry for each distinct (group, mixed key); returns their number."""
    entries = 0
    for i in range(order.size):
        position = order[i]
        if i == 0 or mixed[position] != mixed[order[i - 1]] or groups[position] != groups[order[i - 1]]:
            unique_keys[entries] = keys[position]
            unique_tables[entries] = tables[position]
            offsets[entries] = i
            entries += 1
        inverse[position] = entries - 1
    offsets[entries] = order.size
    return entries


@kernel
def _sum_rows(start, stop, values, value_bytes, code, order, offsets, dim, out):
    for entry in range(start, stop):
        target = out + entry * dim * 4
        sum_rows(values, value_bytes, code, order, offsets[entry], offsets[entry + 1], target, dim)


@kernel
def _sum_integers(start, stop, values, order, offsets, out):
    for entry in range(start, stop):
        total = np.int64(0)
        for i in range(offsets[entry], offsets[entry + 1]):
            total += values[order[i]]
        out[entry] = total


def dedup(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> UniqueKeys:
    n = keys.numel()
    keys_array, tables_array = keys.numpy(), tables.numpy()
    mixed, groups = np.empty(n, np.uint64), np.empty(n, np.uint64)
    parallel_for(
        _mix_and_group, n, keys_array, tables_array, np.uint64(num_tables), np.uint64(world_size), mixed, groups
    )
    order = np.arange(n, dtype=np.int64)
    spare = np.empty(n, np.int64)
    if _radix_passes(mixed, 64 - _SORTED_BITS, 64, order, spare):
        order, spare = spare, order
    group_bits = (num_tables * world_size - 1).bit_length()
    if _radix_passes(groups, 0, group_bits, order, spare):
        order = spare
    _settle(order, mixed, groups)
    unique_keys, unique_tables = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int32)
    inverse, offsets = torch.empty(n, dtype=torch.int64), torch.empty(n + 1, dtype=torch.int64)
    entries = _compact(
        order, mixed, groups, keys_array, tables_array,
        unique_keys.numpy(), unique_tables.numpy(), inverse.numpy(), offsets.numpy(),
    )  # fmt: skip
    return UniqueKeys(
        unique_keys[:entries],
        unique_tables[:entries],
        inverse,
        torch.from_numpy(order),
        offsets[: entries + 1],
        torch.tensor([entries]),
    )


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    order, offsets = unique.order.numpy(), unique.offsets.numpy()
    if values.dtype == torch.int64:
        totals = torch.empty(entries, dtype=torch.int64)
        parallel_for(_sum_integers, entries, values.numpy(), order, offsets, totals.numpy())
        return totals
    values = values.contiguous()
    dim = values.shape[1]
    sums = torch.empty(entries, dim, dtype=torch.float32)
    parallel_for(
        _sum_rows, entries, np.int64(values.data_ptr()), np.int64(dim * values.itemsize), DTYPE_CODES[values.dtype],
        order, offsets, np.int64(dim), np.int64(sums.data_ptr()),
    )  # fmt: skip
    return sums
