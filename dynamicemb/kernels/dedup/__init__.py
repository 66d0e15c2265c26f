"""Each key of a batch once, in the order that the rest of the step needs: sort once, use it four times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["dedup"]


def dedup(
    keys: torch.Tensor,
    tables: torch.Tensor,
    num_tables: int,
    world_size: int,
    lengths_by_table: Optional[Sequence[Sequence[int]]] = None,
) -> UniqueKeys:
    """Sorts a batch by (owner, table, mixed key), stably, and finds its distinct keys.

    Args:
        keys: int64 [N], any values; N is at most 2**30.
        tables: int32 [N], from 0 to ``num_tables - 1``.
        num_tables: tables of the group; ``num_tables * world_size`` stays below 2**31.
        world_size: ranks that share the tables.
        lengths_by_table: for keys that come in parts, by sender and from each sender by table: how many of each table
            come from each sender, ``lengths_by_table[sender][table]``, adding up to N. None for any other order. It
            says nothing that ``tables`` does not say, and changes no result, but makes the CPU engine faster.

    Returns:
        :class:`~dynamicemb.kernels.views.UniqueKeys`. An empty batch gives no entries. Does not synchronise.
    """
    return implementation(__name__, keys.device).dedup(keys, tables, num_tables, world_size, lengths_by_table)
