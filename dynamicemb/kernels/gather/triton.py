"""Gather on the GPU: rows move 128 bits at a time, several of them in one program, columns along the lanes."""

from __future__ import annotations

from typing import Optional

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

# Four loads of 128 bits under way in each thread: a row comes after two other round trips to memory (entry, slot), so
# threads have rows under way a third of the time at best, and one SM needs about 30 KiB under way to be busy.
_BYTES_PER_THREAD = 64
# What rows that stay as they are move as: one kernel for both dtypes of 16 bits.
_WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@triton.jit(do_not_specialize=["total", "chunks"])
def _gather_kernel(
    addresses, slots, inverse, out, total, chunks, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr, DTYPE: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < total
    entry = at
    if not DIRECT:
        entry = tl.load(inverse + at, mask=inside, other=0)
    slot = tl.load(slots + entry, mask=inside, other=-1)
    present = slot >= 0
    columns = tl.arange(0, COLUMNS)
    in_row = (columns < DIM)[None, :]
    rows = row_pointers(addresses, chunks, slot, present, ROW_BYTES, DTYPE)
    values = read_row(rows[:, None] + columns[None, :], present[:, None] & in_row, DTYPE)
    tl.store(out + (at * DIM)[:, None] + columns[None, :], values, mask=inside[:, None] & in_row)


def gather(view: GroupView, slots: torch.Tensor, inverse: Optional[torch.Tensor]) -> torch.Tensor:
    layout = view.layout
    slots = aligned(slots)
    entries = slots if inverse is None else aligned(inverse)
    total = entries.numel()
    out = torch.empty(total, layout.dim, dtype=torch.float32, device=view.device)
    values_per_thread = _BYTES_PER_THREAD // layout.embedding_dtype.itemsize
    rows = row_tile(layout.dim, values_per_thread)
    launch(
        _gather_kernel, triton.cdiv(total, rows), view.addresses, slots, entries, out, total,
        view.addresses.shape[1], DIM=layout.dim, COLUMNS=column_tile(layout.dim), ROWS=rows,
        ROW_BYTES=layout.row_bytes, DTYPE=DTYPE_CODES[layout.embedding_dtype],
        DIRECT=inverse is None, options=LaunchOptions(row_warps(layout.dim, values_per_thread)),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["total"])
def _gather_rows_kernel(
    rows, inverse, out, total, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at < total
    entry = tl.load(inverse + at, mask=inside, other=0)
    columns = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (columns < DIM)[None, :]
    values = tl.load(rows + (entry * DIM)[:, None] + columns[None, :], mask=mask)
    tl.store(out + (at * DIM)[:, None] + columns[None, :], values, mask=mask)


def gather_rows(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    total, dim = inverse.numel(), rows.shape[1]
    out = torch.empty(total, dim, dtype=rows.dtype, device=rows.device)
    words = _WORDS[rows.dtype]
    values_per_thread = _BYTES_PER_THREAD // words.itemsize
    tile = row_tile(dim, values_per_thread)
    launch(
        _gather_rows_kernel, triton.cdiv(total, tile), aligned(rows).view(words), aligned(inverse), out.view(words),
        total, DIM=dim, COLUMNS=column_tile(dim), ROWS=tile,
        options=LaunchOptions(row_warps(dim, values_per_thread)),
    )  # fmt: skip
    return out
