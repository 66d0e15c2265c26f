"""Rows out of the table."""

from __future__ import annotations

from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView

__all__ = ["gather"]


def gather(view: GroupView, slots: torch.Tensor, inverse: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The embedding of each key of a batch.

    Args:
        view: the tables.
        slots: int64 [U], slot handles; a negative one reads as zeros.
        inverse: int64 [N], entry of ``slots`` for each key of the batch; None: ``slots`` has one for each, N = U.

    Returns:
        float32 [N, dim]. Does not synchronise.
    """
    return implementation(__name__, view.device).gather(view, slots, inverse)
