"""Deduplication on the GPU: torch's stable radix sort, a neighbour compare, a prefix sum and one scatter.

Nothing waits for the device: results have the length of the batch, and the number of distinct keys stays in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.triton_support import (
    ADD_ROWS_REGISTERS,
    DTYPE_CODES,
    add_rows,
    column_tile,
    cuda_device,
    float_view,
    mix,
    owner_of,
    row_tile,
    row_warps,
)
from dynamicemb.kernels.views import UniqueKeys

# Four elements for each of 128 threads.
_TILE = 512
_SIGN_BIT = tl.constexpr(1 << 63)


@triton.jit(do_not_specialize=["total", "num_tables", "world_size"])
def _sort_keys_kernel(keys, tables, mixed, groups, total, num_tables, world_size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    h = mix(tl.load(keys + at, mask=inside, other=0))
    # torch sorts signed integers; flipping the sign bit gives them the unsigned order.
    tl.store(mixed + at, (h ^ _SIGN_BIT).to(tl.int64, bitcast=True), mask=inside)
    group = owner_of(h, world_size) * num_tables + tl.load(tables + at, mask=inside, other=0)
    tl.store(groups + at, group.to(groups.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _heads_kernel(keys, tables, order, heads, total, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    after_first = inside & (at > 0)
    here = tl.load(order + at, mask=inside, other=0)
    before = tl.load(order + at - 1, mask=after_first, other=0)
    new_key = tl.load(keys + here, mask=inside, other=0) != tl.load(keys + before, mask=after_first, other=0)
    new_table = tl.load(tables + here, mask=inside, other=0) != tl.load(tables + before, mask=after_first, other=0)
    tl.store(heads + at, ((at == 0) | new_key | new_table).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _scatter_kernel(
    keys, tables, order, numbers, unique_keys, unique_tables, inverse, offsets, count, total, TILE: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < total
    here = tl.load(order + at, mask=inside, other=0)
    number = tl.load(numbers + at, mask=inside, other=0)
    tl.store(inverse + here, number - 1, mask=inside)
    head = inside & (number != tl.load(numbers + at - 1, mask=inside & (at > 0), other=0))
    tl.store(unique_keys + number - 1, tl.load(keys + here, mask=head, other=0), mask=head)
    tl.store(unique_tables + number - 1, tl.load(tables + here, mask=head, other=0), mask=head)
    tl.store(offsets + number - 1, at, mask=head)
    last = at == total - 1
    tl.store(offsets + number, total.to(tl.int64) + tl.zeros_like(at), mask=last)
    tl.store(count + tl.zeros_like(at), number, mask=last)


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


def _group_dtype(groups: int) -> torch.dtype:
    """Narrow: a radix sort takes one pass for each byte of its keys."""
    if groups <= 1 << 8:
        return torch.uint8
    return torch.int16 if groups <= 1 << 15 else torch.int32


def _sorted_positions(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> torch.Tensor:
    """int64 [N], positions sorted stably by (owner, table, mixed key): by the mixed key, then by the rest."""
    mixed = torch.empty_like(keys)
    groups = torch.empty(keys.shape, dtype=_group_dtype(num_tables * world_size), device=keys.device)
    grid = (triton.cdiv(keys.numel(), _TILE),)
    _sort_keys_kernel[grid](keys, tables, mixed, groups, keys.numel(), num_tables, world_size, TILE=_TILE)
    order = torch.sort(mixed, stable=True).indices
    if num_tables == 1:  # the owner is monotone in the mixed key
        return order
    return order[torch.sort(groups[order], stable=True).indices]


def dedup(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> UniqueKeys:
    keys, tables = keys.contiguous(), tables.contiguous()
    n = keys.numel()
    unique_keys, unique_tables, inverse = torch.empty_like(keys), torch.zeros_like(tables), torch.empty_like(keys)
    offsets = torch.full((n + 1,), n, dtype=torch.int64, device=keys.device)
    count = torch.zeros(1, dtype=torch.int64, device=keys.device)
    if n == 0:
        return UniqueKeys(unique_keys, unique_tables, inverse, torch.empty_like(keys), offsets, count)
    with cuda_device(keys):
        order = _sorted_positions(keys, tables, num_tables, world_size)
        heads = torch.empty(n, dtype=torch.int32, device=keys.device)
        grid = (triton.cdiv(n, _TILE),)
        _heads_kernel[grid](keys, tables, order, heads, n, TILE=_TILE)
        numbers = torch.cumsum(heads, dim=0, dtype=torch.int64)
        _scatter_kernel[grid](
            keys, tables, order, numbers, unique_keys, unique_tables, inverse, offsets, count, n, TILE=_TILE
        )
    return UniqueKeys(unique_keys, unique_tables, inverse, order, offsets, count)


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    if values.dtype == torch.int64:
        return _segment_sum_integers(values, unique)
    dim = values.shape[1]
    out = torch.empty(entries, dim, dtype=torch.float32, device=values.device)
    if entries and dim:
        rows = row_tile(dim)
        with cuda_device(values):
            _sum_rows_kernel[(triton.cdiv(entries, rows),)](
                float_view(values), unique.order, unique.offsets, unique.count, out,
                DIM=dim, COLUMNS=column_tile(dim), ROWS=rows, DTYPE=DTYPE_CODES[values.dtype],
                num_warps=row_warps(dim), maxnreg=ADD_ROWS_REGISTERS,
            )  # fmt: skip
    return out


def _segment_sum_integers(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Differences of a prefix sum, exact modulo 2**64: no key's number of occurrences makes it slow."""
    entries = unique.keys.numel()
    out = torch.empty(entries, dtype=torch.int64, device=values.device)
    if entries:
        with cuda_device(values):
            prefix = torch.cumsum(values[unique.order], dim=0)
            _segment_difference_kernel[(triton.cdiv(entries, _TILE),)](
                prefix, unique.offsets, unique.count, out, TILE=_TILE
            )
    return out
