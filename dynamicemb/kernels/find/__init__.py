"""Where keys are, and the touch of those that are there."""

from __future__ import annotations

from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView, UniqueKeys

__all__ = ["find"]


def find(
    view: GroupView, unique: UniqueKeys, scores: Optional[torch.Tensor] = None, accumulate: bool = False
) -> torch.Tensor:
    """Looks up distinct keys; with ``scores``, also sets the score of each key that is found.

    Args:
        view: the tables.
        unique: distinct keys that this rank owns.
        scores: int64 [U], or None to change nothing at all.
        accumulate: add ``scores`` to the stored ones (LFU) instead of overwriting them (LRU, CUSTOMIZED).

    Returns:
        int64 [U], slot handles, −1 where a key is absent; undefined past ``unique.count``. Does not synchronise.
    """
    return implementation(__name__, view.device).find(view, unique, scores, accumulate)
