"""What of a batch's distinct keys goes to each rank, and what travels beside a key."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["count_runs", "with_occurrences"]


def count_runs(unique: UniqueKeys, world_size: int, num_tables: int, out: torch.Tensor) -> None:
    """Counts the keys of each run: those of one table that one rank owns, by rank and then by table.

    The keys are in the order of their runs, so that a search finds where each begins.

    Args:
        unique: the keys, of ``num_tables`` tables.
        world_size: ranks that share the tables.
        num_tables: tables.
        out: int64 [world_size * num_tables], contiguous; what is counted. Does not synchronise.
    """
    implementation(__name__, unique.keys.device).count_runs(unique, world_size, num_tables, out)


def with_occurrences(unique: UniqueKeys) -> torch.Tensor:
    """Each key, and beside it how often the batch has it.

    Args:
        unique: the keys.

    Returns:
        int64 [U, 2]; past ``unique.count``, keys are undefined and their occurrences 0. Does not synchronise.
    """
    return implementation(__name__, unique.keys.device).with_occurrences(unique)
