"""Runs on the CPU: one walk over the result."""

from __future__ import annotations

import torch

from dynamicemb.kernels.numba_support import kernel


@kernel
def _repeat(values, lengths, out):
    at = 0
    for run in range(values.size):
        end = min(at + lengths[run], out.size)
        out[at:end] = values[run]
        at = end


def repeat(values: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
    out = torch.empty(total, dtype=torch.int32)
    _repeat(values.numpy(), lengths.numpy(), out.numpy())
    return out
