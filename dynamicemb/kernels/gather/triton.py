"""Gather on the GPU: rows move 128 bits at a time, several of them in one program, columns along the lanes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.rows_triton import (
    DTYPE_CODES,
    column_tile,
    read_row,
    row_pointers,
    row_tile,
    row_warps,
)
from dynamicemb.kernels.triton_support import (
    aligned,
)
from dynamicemb.kernels.views import GroupView


@triton.jit(do_not_specialize=["total", "chunks"])
def _gather_kernel(
    addresses, slots, inverse, out, total, chunks, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < total
    slot = tl.load(slots + tl.load(inverse + at, mask=inside, other=0), mask=inside, other=-1)
    present = slot >= 0
    columns = tl.arange(0, COLUMNS)
    in_row = (columns < DIM)[None, :]
    rows = row_pointers(addresses, chunks, slot, present, ROW_BYTES, DTYPE)
    values = read_row(rows[:, None] + columns[None, :], present[:, None] & in_row, DTYPE)
    tl.store(out + (at * DIM)[:, None] + columns[None, :], values, mask=inside[:, None] & in_row)


def gather(view: GroupView, slots: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    layout = view.layout
    total = inverse.numel()
    out = torch.empty(total, layout.dim, dtype=torch.float32, device=view.device)
    values_per_thread = 16 // layout.embedding_dtype.itemsize
    rows = row_tile(layout.dim, values_per_thread)
    launch(
        _gather_kernel, triton.cdiv(total, rows), view.addresses, aligned(slots), aligned(inverse), out, total,
        view.addresses.shape[1], DIM=layout.dim, COLUMNS=column_tile(layout.dim), ROWS=rows,
        ROW_BYTES=layout.row_bytes, DTYPE=DTYPE_CODES[layout.embedding_dtype],
        options=LaunchOptions(row_warps(layout.dim, values_per_thread)),
    )  # fmt: skip
    return out
