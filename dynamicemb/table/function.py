"""The autograd function: a lookup on the way forward, an optimizer step on the way back."""

from __future__ import annotations

from typing import Any, Optional

import torch

from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.table.group import TableGroup

__all__ = ["expand", "lookup"]


class _Lookup(torch.autograd.Function):
    """Returns rows that require a gradient, and applies that gradient to the table instead of handing it on."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        group: TableGroup,
        keys: torch.Tensor,
        tables: torch.Tensor,
        counts: Optional[torch.Tensor],
    ) -> torch.Tensor:
        rows, ctx.training_lookup = group.train_lookup(keys, tables, counts)
        ctx.group = group
        return rows

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[None, ...]:
        ctx.group.apply_gradients(ctx.training_lookup, gradients)
        return None, None, None, None, None


def lookup(
    group: TableGroup,
    anchor: torch.Tensor,
    keys: torch.Tensor,
    tables: torch.Tensor,
    counts: Optional[torch.Tensor],
    training: bool,
) -> torch.Tensor:
    """Rows of a batch of keys.

    Args:
        group: the tables.
        anchor: a tensor that requires a gradient, so that autograd comes back to the table; it never gets one.
        keys: int64 [N], owned by this rank.
        tables: int32 [N], table of each key.
        counts: int64 [N], occurrences that each entry stands for; None: one each.
        training: insert absent keys, touch scores and update on the way back; otherwise change nothing.

    Returns:
        float32 [N, dim].
    """
    if training:
        return _Lookup.apply(anchor, group, keys, tables, counts)
    with torch.no_grad():
        return group.eval_lookup(keys, tables)


class _Expand(torch.autograd.Function):
    """Rows of distinct keys to rows of a batch; the way back sums in batch order, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
        ctx.unique, ctx.dtype = unique, rows.dtype
        return rows.index_select(0, unique.inverse)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return segment_sum(gradients, ctx.unique).to(ctx.dtype), None


def expand(rows: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """The row of each key of a batch.

    Args:
        rows: float [U, dim], a row for each distinct key.
        unique: the batch.

    Returns:
        [N, dim] in the dtype of ``rows``; its gradient is summed over equal keys in batch order, in float32.
    """
    return _Expand.apply(rows, unique)
