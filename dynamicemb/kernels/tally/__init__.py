"""The end of a training lookup: what became of its keys is counted, and time goes on."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["tally"]


def tally(unique: UniqueKeys, status: torch.Tensor, outcomes: torch.Tensor, clock: torch.Tensor) -> None:
    """Adds the outcomes of one training lookup to those of the lookups before it, and advances the clocks.

    It comes after the kernels that read a clock for a score, so that nothing else has to be launched for the clocks.

    Args:
        unique: distinct keys that this rank owns, so that their tables ascend.
        status: int8 [U], a :class:`~dynamicemb.kernels.views.KeyStatus` each, as
            :func:`~dynamicemb.kernels.insert.insert` returned it.
        outcomes: int64 [T, len(KeyStatus)]; changed in place.
        clock: int64 [T], step clock of each table; one more afterwards, also for an empty batch. Does not synchronise.
    """
    implementation(__name__, status.device).tally(unique, status, outcomes, clock)
