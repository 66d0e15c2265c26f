"""Places for keys that are absent, and the eviction that makes room for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView, Scores, UniqueKeys

__all__ = ["Insertion", "insert"]


@dataclass(frozen=True)
class Insertion:
    """What became of each of ``U`` distinct keys.

    Attributes:
        status: int8 [U], a :class:`~dynamicemb.kernels.views.KeyStatus`.
        evicted_keys: int64 [U], the key that gave way, where the status is REPLACED; undefined elsewhere.
        evicted_scores: int64 [U], that key's score. Its row stays in the slot until the new one is filled in.
    """

    status: torch.Tensor
    evicted_keys: torch.Tensor
    evicted_scores: torch.Tensor


def insert(
    view: GroupView,
    unique: UniqueKeys,
    slots: torch.Tensor,
    scores: Scores,
    status: Optional[torch.Tensor] = None,
) -> Insertion:
    """Gives each absent key a slot of its bucket, if it can.

    The absent keys of a bucket, in their order in ``unique``, take its empty slots in ascending order, then the slots
    of the keys with the least (score, key) that are not in this batch; what is left is refused. A placed key's digest,
    key and score are stored; its row is not touched.

    Args:
        view: the tables; digests, keys and scores change.
        unique: distinct keys that this rank owns.
        slots: int64 [U], as :func:`~dynamicemb.kernels.find.find` returned them for ``unique``; changed in place: an
            absent key gets its new slot, or stays −1 if it is refused.
        scores: that placed keys begin with.
        status: int8 [U], as :func:`~dynamicemb.kernels.find.find` left it; what became of absent keys is added. None:
            all that have a slot were found.

    Returns:
        :class:`Insertion`; undefined past ``unique.count``. Does not synchronise.
    """
    return implementation(__name__, view.device).insert(view, unique, slots, scores, status)
