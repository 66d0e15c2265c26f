"""Sums over the entries of a batch that belong to one key."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["segment_sum"]


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Sums the rows that belong to each distinct key, in batch order, in float32 for floats and int64 for integers.

    Args:
        values: float32, float16 or bfloat16 [N, D], or int64 [N].
        unique: of the same batch.

    Returns:
        float32 [U, D], or int64 [U]; entries past ``unique.count`` are undefined. Does not synchronise.
    """
    return implementation(__name__, values.device).segment_sum(values, unique)
