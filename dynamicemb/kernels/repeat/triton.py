"""Runs on the GPU: several programs share a run, and each adds up for itself the lengths of the runs before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import launch
from dynamicemb.kernels.triton_support import aligned

_TILE = 1024


@triton.jit(do_not_specialize=["shares", "total"])
def _repeat_kernel(values, lengths, out, shares, total, TILE: tl.constexpr):
    run = tl.program_id(0) // shares
    share = tl.program_id(0) % shares
    lanes = tl.arange(0, TILE)
    begin = tl.zeros([], tl.int64)
    for first in range(0, run, TILE):
        before = first + lanes
        begin += tl.sum(tl.load(lengths + before, mask=before < run, other=0), axis=0)
    end = tl.minimum(begin + tl.load(lengths + run), total)
    value = tl.load(values + run) + tl.zeros([TILE], tl.int32)
    begin += share.to(tl.int64) * TILE
    while begin < end:
        tl.store(out + begin + lanes, value, mask=begin + lanes < end)
        begin += shares * TILE


def repeat(values: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
    values, lengths, runs = aligned(values), aligned(lengths), values.numel()
    out = torch.empty(total, dtype=torch.int32, device=values.device)
    if total:
        # As many programs as there are tiles, and one more for each run at most.
        shares = triton.cdiv(total, runs * _TILE)
        launch(_repeat_kernel, runs * shares, values, lengths, out, shares, total, TILE=_TILE)
    return out
