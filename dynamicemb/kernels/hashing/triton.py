"""Mixing and owners of keys on the GPU: one load, a dozen instructions and one store for each key."""

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

_TILE = 1024


@triton.jit(do_not_specialize=["total"])
def _mix_kernel(keys, out, total, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mixed = mix(tl.load(keys + at, mask=at < total, other=0))
    tl.store(out + at, mixed.to(tl.int64, bitcast=True), mask=at < total)


@triton.jit(do_not_specialize=["total", "world_size"])
def _owner_kernel(keys, out, total, world_size, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mixed = mix(tl.load(keys + at, mask=at < total, other=0))
    tl.store(out + at, owner_of(mixed, world_size), mask=at < total)


def mix64(keys: torch.Tensor) -> torch.Tensor:
    keys = aligned(keys)
    out = torch.empty_like(keys)
    launch(_mix_kernel, triton.cdiv(keys.numel(), _TILE), keys, out, keys.numel(), TILE=_TILE)
    return out


def owners(keys: torch.Tensor, world_size: int) -> torch.Tensor:
    keys = aligned(keys)
    out = torch.empty_like(keys)
    launch(_owner_kernel, triton.cdiv(keys.numel(), _TILE), keys, out, keys.numel(), world_size, TILE=_TILE)
    return out
