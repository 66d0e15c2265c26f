"""Sums of a key's rows on the GPU: first of whole blocks, by programs of their own, then of what is left.

So no program adds up more than a block, and one row for each further block, however often a key occurs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, grid_stride_programs, launch
from dynamicemb.kernels.rows_triton import (
    DTYPE_CODES,
    add_rows,
    column_tile,
    float_view,
    row_tile,
    row_warps,
    sum_rows,
    sum_rows_registers,
)
from dynamicemb.kernels.segment_sum import BLOCK_ROWS
from dynamicemb.kernels.triton_support import aligned
from dynamicemb.kernels.views import UniqueKeys

# Of integers: keys of a program, and values of a key that are read at once.
_ENTRIES = 64
_LANES = 8
# One warp for a key, so that none waits for another one's duplicates.
_WARPS = 1
# A block is 128 rows in a row, and a launch has few: the more of them are under way, the better. 16 fit into 96
# registers, of which an SM has enough for 20 warps.
_BLOCK_LOADS = tl.constexpr(16)
SUM_BLOCK_REGISTERS = 96


@triton.jit
def sum_block(
    values, order, inverse, offsets, out, window, DIM: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the whole block, if there is one, that begins in the ``window``-th BLOCK of sorted positions.

    Such a block reaches past the last of these positions, so it belongs to the key there, and there is only one. It
    begins less than BLOCK before that position: block ``i`` of a key that begins at ``b`` is row ``b // BLOCK + i``.
    """
    last = window * BLOCK + BLOCK - 1
    entry = tl.load(inverse + tl.load(order + last))
    key_begin = tl.load(offsets + entry)
    begin = key_begin + (last - key_begin) // BLOCK * BLOCK
    if begin + BLOCK <= tl.load(offsets + entry + 1):
        columns = tl.arange(0, COLUMNS)
        begins = begin + tl.zeros([1], tl.int64)
        total = tl.zeros([1, COLUMNS], tl.float32)
        total = add_rows(total, values, order, begins, begins + BLOCK, columns, DIM, DTYPE, _BLOCK_LOADS)
        tl.store(out + (window * DIM + columns)[None, :], total, mask=(columns < DIM)[None, :])


@triton.jit(do_not_specialize=["blocks"])
def _block_sums_kernel(
    values, order, inverse, offsets, out, blocks, DIM: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    if window < blocks:
        sum_block(values, order, inverse, offsets, out, window, DIM, COLUMNS, DTYPE, BLOCK)


@triton.jit
def _sum_rows_kernel(
    values, order, offsets, count, block_sums, out, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    columns = tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < entries:
        entry = first + tl.arange(0, ROWS)
        inside = entry < entries
        begins = tl.load(offsets + entry, mask=inside, other=0)
        ends = tl.load(offsets + entry + 1, mask=inside, other=0)
        total = sum_rows(values, order, block_sums, begins, ends, columns, DIM, DTYPE, BLOCK)
        mask = inside[:, None] & (columns < DIM)[None, :]
        tl.store(out + (entry * DIM)[:, None] + columns[None, :], total, mask=mask)
        first += tl.num_programs(0).to(tl.int64) * ROWS


@triton.jit
def _sum_integers_kernel(values, order, offsets, count, out, ENTRIES: tl.constexpr, LANES: tl.constexpr):
    """LANES values of each of ENTRIES keys at a time."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < tl.load(count)
    begin = tl.load(offsets + entry, mask=inside, other=0)
    end = tl.load(offsets + entry + 1, mask=inside, other=0)
    total = tl.zeros([ENTRIES], tl.int64)
    for first in range(0, tl.max(end - begin, axis=0), LANES):
        at = begin[:, None] + first + tl.arange(0, LANES)[None, :]
        mask = at < end[:, None]
        place = tl.load(order + at, mask=mask, other=0)
        total += tl.sum(tl.load(values + place, mask=mask, other=0), axis=1)
    tl.store(out + entry, total, mask=inside)


def empty_block_sums(values: torch.Tensor) -> torch.Tensor:
    """float32 [N // BLOCK_ROWS, D], for the sums of whole blocks of ``values``, [N, D]."""
    rows, dim = values.shape
    return torch.empty(rows // BLOCK_ROWS, dim, dtype=torch.float32, device=values.device)


def _block_sums(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Sums of all keys' whole blocks, for :func:`~dynamicemb.kernels.rows_triton.sum_rows`; most rows are undefined."""
    out = empty_block_sums(values)
    blocks, dim = out.shape
    # Also where there are none, so that a step has as many launches for a small batch.
    launch(
        _block_sums_kernel, max(1, blocks), float_view(values), unique.order, unique.inverse, unique.offsets, out,
        blocks, DIM=dim, COLUMNS=column_tile(dim), DTYPE=DTYPE_CODES[values.dtype], BLOCK=BLOCK_ROWS,
        options=LaunchOptions(row_warps(dim, warps=_WARPS), SUM_BLOCK_REGISTERS),
    )  # fmt: skip
    return out


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    if values.dtype == torch.int64:
        return _segment_sum_integers(values, unique)
    dim = values.shape[1]
    out = torch.empty(entries, dim, dtype=torch.float32, device=values.device)
    if entries and dim:
        rows = row_tile(dim, warps=_WARPS)
        options = LaunchOptions(row_warps(dim, warps=_WARPS), sum_rows_registers(dim))
        launch(
            _sum_rows_kernel, grid_stride_programs(triton.cdiv(entries, rows), values, options), float_view(values),
            unique.order, unique.offsets, unique.count, _block_sums(values, unique), out, DIM=dim,
            COLUMNS=column_tile(dim), ROWS=rows, DTYPE=DTYPE_CODES[values.dtype], BLOCK=BLOCK_ROWS,
            options=options,
        )  # fmt: skip
    return out


def _segment_sum_integers(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Made for occurrences that ranks have counted, of which a key has one from each rank at most."""
    entries = unique.keys.numel()
    out = torch.empty(entries, dtype=torch.int64, device=values.device)
    launch(
        _sum_integers_kernel, triton.cdiv(entries, _ENTRIES), aligned(values), unique.order, unique.offsets,
        unique.count, out, ENTRIES=_ENTRIES, LANES=_LANES,
    )  # fmt: skip
    return out
