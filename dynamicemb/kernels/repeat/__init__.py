"""Numbers of runs to numbers of all that is in them."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation

__all__ = ["repeat"]


def repeat(values: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
    """Each value as often as its length says, one after the other: ``torch.repeat_interleave`` in one kernel.

    Args:
        values: int32 [R].
        lengths: int64 [R], none negative.
        total: their sum, N; nothing is written past it, whatever the lengths are.

    Returns:
        int32 [N]. Does not synchronise.
    """
    return implementation(__name__, values.device).repeat(values, lengths, total)
