"""The end of a training lookup: what became of its keys is counted, and time goes on."""

from __future__ import annotations

from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import EvictionView, UniqueKeys

__all__ = ["TALLY_TILE", "tally"]

#: Keys whose evictions are counted together.
TALLY_TILE = 1024


def tally(
    unique: UniqueKeys,
    status: torch.Tensor,
    outcomes: torch.Tensor,
    clock: torch.Tensor,
    log: Optional[EvictionView] = None,
) -> Optional[torch.Tensor]:
    """Adds the outcomes of one training lookup to those of the lookups before it, and advances the clocks.

    It comes after the kernels that read a clock for a score, so that nothing else has to be launched for the clocks.

    Args:
        unique: distinct keys that this rank owns, so that their tables ascend.
        status: int8 [U], a :class:`~dynamicemb.kernels.views.KeyStatus` each, as
            :func:`~dynamicemb.kernels.insert.insert` returned it.
        outcomes: int64 [T, len(KeyStatus)]; changed in place.
        clock: int64 [T], step clock of each table; one more afterwards, also for an empty batch.
        log: counts the lookup and its evictions, if they are to be noted.

    Returns:
        int32 [ceil(U / TALLY_TILE)], keys with the status REPLACED of each so many entries, for
        :func:`~dynamicemb.kernels.note.note`; None without a log. Does not synchronise.
    """
    return implementation(__name__, status.device).tally(unique, status, outcomes, clock, log)
