"""Deduplication on the GPU: torch's stable radix sort, a neighbour compare, a prefix sum and one scatter.

Nothing waits for the device: results have the length of the batch, and the number of distinct keys stays in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import launch
from dynamicemb.kernels.triton_support import (
    aligned,
    mix,
    owner_of,
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


def _group_dtype(groups: int) -> torch.dtype:
    """Narrow: a radix sort takes one pass for each byte of its keys."""
    if groups <= 1 << 8:
        return torch.uint8
    return torch.int16 if groups <= 1 << 15 else torch.int32


def _sorted_positions(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> torch.Tensor:
    """int64 [N], positions sorted stably by (owner, table, mixed key): by the mixed key, then by the rest."""
    mixed = torch.empty_like(keys)
    groups = torch.empty(keys.shape, dtype=_group_dtype(num_tables * world_size), device=keys.device)
    launch(
        _sort_keys_kernel, triton.cdiv(keys.numel(), _TILE), keys, tables, mixed, groups, keys.numel(), num_tables,
        world_size, TILE=_TILE,
    )  # fmt: skip
    order = torch.sort(mixed, stable=True).indices
    if num_tables == 1:  # the owner is monotone in the mixed key
        return order
    return order[torch.sort(groups[order], stable=True).indices]


def dedup(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> UniqueKeys:
    keys, tables = aligned(keys), aligned(tables)
    n = keys.numel()
    unique_keys, unique_tables, inverse = torch.empty_like(keys), torch.zeros_like(tables), torch.empty_like(keys)
    offsets = torch.full((n + 1,), n, dtype=torch.int64, device=keys.device)
    count = torch.zeros(1, dtype=torch.int64, device=keys.device)
    if n == 0:
        return UniqueKeys(unique_keys, unique_tables, inverse, torch.empty_like(keys), offsets, count)
    order = _sorted_positions(keys, tables, num_tables, world_size)
    heads = torch.empty(n, dtype=torch.int32, device=keys.device)
    programs = triton.cdiv(n, _TILE)
    launch(_heads_kernel, programs, keys, tables, order, heads, n, TILE=_TILE)
    numbers = torch.cumsum(heads, dim=0, dtype=torch.int64)
    launch(
        _scatter_kernel, programs, keys, tables, order, numbers, unique_keys, unique_tables, inverse, offsets, count,
        n, TILE=_TILE,
    )  # fmt: skip
    return UniqueKeys(unique_keys, unique_tables, inverse, order, offsets, count)
