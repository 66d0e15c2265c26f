"""How many keys of each table were found, inserted, replaced another one, or were refused."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["tally"]


def tally(unique: UniqueKeys, status: torch.Tensor, outcomes: torch.Tensor) -> None:
    """Adds the outcomes of one training lookup to those of the lookups before it.

    Args:
        unique: distinct keys that this rank owns, so that their tables ascend.
        status: int8 [U], a :class:`~dynamicemb.kernels.views.KeyStatus` each, as
            :func:`~dynamicemb.kernels.insert.insert` returned it.
        outcomes: int64 [T, len(KeyStatus)]; changed in place. Does not synchronise.
    """
    implementation(__name__, status.device).tally(unique, status, outcomes)
