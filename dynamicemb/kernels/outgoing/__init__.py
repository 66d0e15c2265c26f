"""What of a batch's distinct keys goes to each rank, and what travels beside a key."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["count_runs", "with_occurrences"]


def count_runs(unique: UniqueKeys, out: torch.Tensor) -> None:
    """Counts the keys of each run: those of one table that one rank owns, by rank and then by table.

    The keys are in the order of their runs, so that a search finds where each begins.

    Args:
        unique: the keys.
        out: int64 [ranks that share the tables, tables], contiguous; takes the counts. Does not synchronise.
    """
    implementation(__name__, unique.keys.device).count_runs(unique, out)


def with_occurrences(unique: UniqueKeys) -> torch.Tensor:
    """Each key, and beside it how often the batch has it.

    Args:
        unique: the keys.

    Returns:
        int64 [U, 2]; past ``unique.count``, keys are undefined and their occurrences 0. Does not synchronise.
    """
    return implementation(__name__, unique.keys.device).with_occurrences(unique)
