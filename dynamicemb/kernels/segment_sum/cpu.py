"""Sums of a key's rows on the CPU, keys shared out among threads."""

from __future__ import annotations

import numpy as np
import torch

from dynamicemb.kernels.host_memory import empty_rows
from dynamicemb.kernels.numba_support import kernel, parallel_for, stack_bytes
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, MAX_ROW_BYTES, sum_rows
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.options import MAX_DIM


@kernel
def _sum_rows(start, stop, values, row_bytes, code, order, offsets, dim, out):
    block = stack_bytes(MAX_ROW_BYTES)
    for entry in range(start, stop):
        for column in range(0, dim, MAX_DIM):  # rows of static tables may be wider than ``block``
            sum_rows(
                values + column * (row_bytes // dim), row_bytes, code, order, offsets[entry], offsets[entry + 1],
                out + (entry * dim + column) * 4, block, min(dim - column, MAX_DIM),
            )  # fmt: skip


@kernel
def _sum_integers(start, stop, values, order, offsets, out):
    for entry in range(start, stop):
        total = np.int64(0)
        for i in range(offsets[entry], offsets[entry + 1]):
            total += values[order[i]]
        out[entry] = total


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    order, offsets = unique.order.numpy(), unique.offsets.numpy()
    if values.dtype == torch.int64:
        totals = torch.empty(entries, dtype=torch.int64)
        parallel_for(_sum_integers, entries, values.numpy(), order, offsets, totals.numpy())
        return totals
    values = values.contiguous()
    dim = values.shape[1]
    sums = empty_rows(entries, dim)
    parallel_for(
        _sum_rows, entries, np.int64(values.data_ptr()), np.int64(dim * values.itemsize), DTYPE_CODES[values.dtype],
        order, offsets, np.int64(dim), np.int64(sums.data_ptr()),
    )  # fmt: skip
    return sums
