"""Gather on the CPU: one copy for each key of the batch."""

from __future__ import annotations

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.numba_support import kernel, parallel_for
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, read_row
from dynamicemb.kernels.views import AddressRow, GroupView

_ROWS = np.int64(AddressRow.ROWS)


@kernel
def _gather(start, stop, addresses, row_bytes, code, slots, inverse, out):
    for i in range(start, stop):
        slot = slots[inverse[i]]
        if slot < 0:
            out[i, :] = np.float32(0)
        else:
            read_row(addresses[_ROWS, chunk_of(slot)] + offset_of(slot) * row_bytes, code, out[i])


def gather(view: GroupView, slots: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    layout = view.layout
    out = torch.empty(inverse.numel(), layout.dim, dtype=torch.float32)
    parallel_for(
        _gather, inverse.numel(), view.addresses.numpy(), np.int64(layout.row_bytes),
        DTYPE_CODES[layout.embedding_dtype], slots.numpy(), inverse.numpy(), out.numpy(),
    )  # fmt: skip
    return out
