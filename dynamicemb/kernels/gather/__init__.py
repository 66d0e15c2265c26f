"""Rows out of the table, and out of a tensor."""

from __future__ import annotations

from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView

__all__ = ["gather", "gather_rows"]


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


def gather_rows(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The row of each key of a batch, as they are: :func:`gather` for rows that have left the table.

    ``torch.index_select`` does the same. On a GPU it moves less than 128 bits with one instruction; on the CPU its
    large results begin on small pages, whose faults take longer than the copies.

    Args:
        rows: float32, float16 or bfloat16 [U, dim], a row for each distinct key; U > 0 unless N is 0.
        inverse: int64 [N], row of each key of the batch.

    Returns:
        [N, dim] in the dtype of ``rows``. Does not synchronise.
    """
    return implementation(__name__, rows.device).gather_rows(rows, inverse)
