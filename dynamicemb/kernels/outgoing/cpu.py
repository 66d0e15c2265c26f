"""Runs of keys on the CPU: a binary search for the first key of each."""

from __future__ import annotations

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import mix
from dynamicemb.kernels.numba_support import inline, kernel, mulhi64, parallel_for
from dynamicemb.kernels.views import UniqueKeys


@inline
def _first_of(run, keys, tables, count, world_size, num_tables):
    """Where the first of ``count`` keys lies whose run is ``run`` or a later one."""
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if np.int64(mulhi64(mix(keys[middle]), world_size)) * num_tables + tables[middle] < run:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _count_runs(keys, tables, count, world_size, num_tables, out):
    begin = 0
    for run in range(out.size):
        end = _first_of(run + 1, keys, tables, count[0], world_size, num_tables)
        out[run] = end - begin
        begin = end


@kernel
def _with_occurrences(start, stop, keys, offsets, out):
    for entry in range(start, stop):
        out[entry, 0] = keys[entry]
        out[entry, 1] = offsets[entry + 1] - offsets[entry]


def count_runs(unique: UniqueKeys, out: torch.Tensor) -> None:
    world_size, num_tables = out.shape
    keys, tables, count = unique.keys.numpy(), unique.tables.numpy(), unique.count.numpy()
    _count_runs(keys, tables, count, np.uint64(world_size), np.int64(num_tables), out.view(-1).numpy())


def with_occurrences(unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    out = torch.empty(entries, 2, dtype=torch.int64)
    parallel_for(_with_occurrences, entries, unique.keys.numpy(), unique.offsets.numpy(), out.numpy())
    return out
