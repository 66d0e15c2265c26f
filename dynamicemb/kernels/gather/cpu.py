"""Gather on the CPU: one copy for each key of the batch."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.host_memory import empty_rows
from dynamicemb.kernels.numba_support import as_float32, copy_bytes, kernel, parallel_for, prefetch, rows_ahead
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, read_row
from dynamicemb.kernels.views import AddressRow, GroupView

_ROWS = np.int64(AddressRow.ROWS)


@kernel
def _gather(start, stop, addresses, row_bytes, used_bytes, code, slots, inverse, dim, out):
    distance = rows_ahead(row_bytes)
    for i in range(start, stop):
        ahead = slots[inverse[min(i + distance, stop - 1)]]
        if ahead >= 0:
            prefetch(addresses[_ROWS, chunk_of(ahead)] + offset_of(ahead) * row_bytes, used_bytes)
        slot = slots[inverse[i]]
        target = out + i * dim * 4
        if slot < 0:
            values = as_float32(target)
            for column in range(dim):
                values[column] = np.float32(0)
        else:
            read_row(addresses[_ROWS, chunk_of(slot)] + offset_of(slot) * row_bytes, code, target, dim)


def gather(view: GroupView, slots: torch.Tensor, inverse: Optional[torch.Tensor]) -> torch.Tensor:
    layout = view.layout
    if inverse is None:
        inverse = torch.arange(slots.numel())
    out = empty_rows(inverse.numel(), layout.dim)
    parallel_for(
        _gather, inverse.numel(), view.addresses.numpy(), np.int64(layout.row_bytes),
        np.int64(layout.dim * layout.embedding_dtype.itemsize), DTYPE_CODES[layout.embedding_dtype], slots.numpy(),
        inverse.numpy(), np.int64(layout.dim), np.int64(out.data_ptr()),
    )  # fmt: skip
    return out


@kernel
def _gather_rows(start, stop, rows, row_bytes, inverse, out):
    distance = rows_ahead(row_bytes)
    for i in range(start, stop):
        prefetch(rows + inverse[min(i + distance, stop - 1)] * row_bytes, row_bytes)
        copy_bytes(out + i * row_bytes, rows + inverse[i] * row_bytes, row_bytes)


def gather_rows(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    rows = rows.contiguous()
    total, dim = inverse.numel(), rows.shape[1]
    out = empty_rows(total, dim, rows.dtype)
    parallel_for(
        _gather_rows, total, np.int64(rows.data_ptr()), np.int64(dim * rows.element_size()), inverse.numpy(),
        np.int64(out.data_ptr()),
    )  # fmt: skip
    return out
