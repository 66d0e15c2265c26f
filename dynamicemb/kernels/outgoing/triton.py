"""Runs of keys on the GPU: a program for each run, whose lanes look at as many keys at a time.

A search in two would wait for memory twenty times in a batch of a million keys; one in 129 waits three times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch
from dynamicemb.kernels.triton_support import aligned, mix, owner_of
from dynamicemb.kernels.views import UniqueKeys

_LANES = 128
# A run is a warp's: its lanes agree on what they have seen without waiting for others.
_OPTIONS = LaunchOptions(num_warps=1)
_TILE = 256


@triton.jit
def _first_of(run, keys, tables, count, world_size, num_tables, LANES: tl.constexpr):
    """Where the first of ``count`` keys lies whose run is ``run`` or a later one."""
    lanes = tl.arange(0, LANES)
    low = tl.zeros([], tl.int64)
    high = count
    while low < high:
        stride = (high - low + LANES - 1) // LANES
        at = low + lanes * stride
        there = at < high
        owner = owner_of(mix(tl.load(keys + at, mask=there, other=0)), world_size)
        runs = owner * num_tables + tl.load(tables + at, mask=there, other=0)
        # The keys that belong to earlier runs come first, so their number says between which two to go on.
        earlier = tl.sum((there & (runs < run)).to(tl.int32), axis=0).to(tl.int64)
        high = tl.minimum(high, low + earlier * stride)
        low = tl.where(earlier > 0, low + (earlier - 1) * stride + 1, low)
    return low


@triton.jit(do_not_specialize=["world_size", "num_tables"])
def _count_runs_kernel(keys, tables, count, out, world_size, num_tables, LANES: tl.constexpr):
    run = tl.program_id(0).to(tl.int64)
    valid = tl.load(count)
    begin = _first_of(run, keys, tables, valid, world_size, num_tables, LANES)
    end = _first_of(run + 1, keys, tables, valid, world_size, num_tables, LANES)
    tl.store(out + run, end - begin)


@triton.jit(do_not_specialize=["total"])
def _with_occurrences_kernel(keys, offsets, out, total, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < total
    occurrences = tl.load(offsets + at + 1, mask=mask) - tl.load(offsets + at, mask=mask)
    tl.store(out + at * 2, tl.load(keys + at, mask=mask), mask=mask)
    tl.store(out + at * 2 + 1, occurrences, mask=mask)


def count_runs(unique: UniqueKeys, out: torch.Tensor) -> None:
    world_size, num_tables = out.shape
    launch(
        _count_runs_kernel, out.numel(), aligned(unique.keys), aligned(unique.tables), unique.count, out, world_size,
        num_tables, LANES=_LANES, options=_OPTIONS,
    )  # fmt: skip


def with_occurrences(unique: UniqueKeys) -> torch.Tensor:
    entries = unique.keys.numel()
    out = torch.empty(entries, 2, dtype=torch.int64, device=unique.keys.device)
    launch(
        _with_occurrences_kernel, triton.cdiv(entries, _TILE), aligned(unique.keys), aligned(unique.offsets), out,
        entries, TILE=_TILE,
    )  # fmt: skip
    return out
