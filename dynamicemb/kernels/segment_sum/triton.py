"""Sums of a key's rows on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.rows_triton import (
    ADD_ROWS_REGISTERS,
    DTYPE_CODES,
    add_rows,
    column_tile,
    float_view,
    row_tile,
    row_warps,
)
from dynamicemb.kernels.views import UniqueKeys

_TILE = 512


@triton.jit
def _sum_rows_kernel(
    values, order, offsets, count, out, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program for ROWS distinct keys; costs one round trip to memory for each 16 duplicates of the commonest."""
    entries = tl.load(count)
    first = tl.program_id(0).to(tl.int64) * ROWS
    if first >= entries:
        return
    entry = first + tl.arange(0, ROWS)
    inside = entry < entries
    columns = tl.arange(0, COLUMNS)
    begins = tl.load(offsets + entry, mask=inside, other=0)
    ends = tl.load(offsets + entry + 1, mask=inside, other=0)
    total = add_rows(tl.zeros([ROWS, COLUMNS], tl.float32), values, order, begins, ends, columns, DIM, DTYPE)
    mask = inside[:, None] & (columns < DIM)[None, :]
    tl.store(out + (entry * DIM)[:, None] + columns[None, :], total, mask=mask)


@triton.jit
def _segment_difference_kernel(prefix, offsets, count, out, TILE: tl.constexpr):
    entries = tl.load(count)
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = entry < entries
    begin = tl.load(offsets + entry, mask=inside, other=0)
    end = tl.load(offsets + entry + 1, mask=inside, other=0)
    before = tl.load(prefix + begin - 1, mask=inside & (begin > 0), other=0)
    tl.store(out + entry, tl.load(prefix + end - 1, mask=inside, other=0) - before, mask=inside)


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    if values.dtype == torch.int64:
        return _segment_sum_integers(values, unique)
    dim = values.shape[1]
    out = torch.empty(entries, dim, dtype=torch.float32, device=values.device)
    if entries and dim:
        rows = row_tile(dim)
        launch(
            _sum_rows_kernel, triton.cdiv(entries, rows), float_view(values), unique.order, unique.offsets,
            unique.count, out, DIM=dim, COLUMNS=column_tile(dim), ROWS=rows, DTYPE=DTYPE_CODES[values.dtype],
            options=LaunchOptions(row_warps(dim), ADD_ROWS_REGISTERS),
        )  # fmt: skip
    return out


def _segment_sum_integers(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Differences of a prefix sum, exact modulo 2**64: no key's number of occurrences makes it slow."""
    entries = unique.keys.numel()
    out = torch.empty(entries, dtype=torch.int64, device=values.device)
    if entries:
        prefix = torch.cumsum(values[unique.order], dim=0)
        launch(
            _segment_difference_kernel, triton.cdiv(entries, _TILE), prefix, unique.offsets, unique.count, out,
            TILE=_TILE,
        )  # fmt: skip
    return out
