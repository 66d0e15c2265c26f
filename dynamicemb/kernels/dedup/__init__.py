"""Each key of a batch once, in the order that the rest of the step needs: sort once, use it four times."""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["dedup", "segment_sum"]


def dedup(keys: torch.Tensor, tables: torch.Tensor, num_tables: int, world_size: int) -> UniqueKeys:
    """Sorts a batch by (owner, table, mixed key), stably, and finds its distinct keys.

    Args:
        keys: int64 [N], any values.
        tables: int32 [N], from 0 to ``num_tables - 1``.
        num_tables: tables of the group; ``num_tables * world_size`` stays below 2**31.
        world_size: ranks that share the tables.

    Returns:
        :class:`~dynamicemb.kernels.views.UniqueKeys`. An empty batch gives no entries. Does not synchronise.
    """
    return implementation(__name__, keys.device).dedup(keys, tables, num_tables, world_size)


def segment_sum(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Sums the rows that belong to each distinct key, in batch order, in float32 for floats and int64 for integers.

    Args:
        values: float32, float16 or bfloat16 [N, D], or int64 [N].
        unique: of the same batch.

    Returns:
        float32 [U, D], or int64 [U]; entries past ``unique.count`` are undefined. Does not synchronise.
    """
    return implementation(__name__, values.device).segment_sum(values, unique)
