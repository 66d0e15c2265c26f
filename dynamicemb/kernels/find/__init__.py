"""Where keys are, and the touch of those that are there."""

from __future__ import annotations

from typing import Optional, Union

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView, KeyBatch, Scores, UniqueKeys

__all__ = ["find"]


def find(
    view: GroupView,
    batch: Union[UniqueKeys, KeyBatch],
    scores: Optional[Scores] = None,
    accumulate: bool = False,
    status: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Looks up keys; with ``scores``, also sets the score of each key that is found.

    Args:
        view: the tables.
        batch: keys that this rank owns, as :class:`UniqueKeys` where there are scores to set.
        scores: None to change nothing at all.
        accumulate: add ``scores`` to the stored ones (LFU) instead of overwriting them (LRU, CUSTOMIZED).
        status: int8 [U], only with ``scores``: the entries of keys that are found become ``FOUND``, and the others
            are left to :func:`~dynamicemb.kernels.insert.insert`.

    Returns:
        int64 [U], slot handles, −1 where a key is absent; undefined past ``batch.count``. Does not synchronise.
    """
    return implementation(__name__, view.device).find(view, batch, scores, accumulate, status)
