"""The autograd functions: a lookup on the way forward, an optimizer step on the way back.

What the way back needs is saved as autograd's own saved tensors: it is freed when it has been used, however long the
loss lives, a second backward pass raises unless the graph is retained, and hooks for saved tensors see all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable

from dynamicemb.kernels.gather import gather_rows
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.table.eager import eager
from dynamicemb.table.group import TableGroup, TrainingLookup

__all__ = ["expand", "lookup", "requires_grad", "without_update"]


def requires_grad(weights: Sequence[torch.Tensor]) -> list[bool]:
    """``requires_grad`` of each tensor; for a parameter with a ``__torch_function__`` without a call of it."""
    with torch._C.DisableTorchFunctionSubclass():
        return [weight.requires_grad for weight in weights]


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
        weights: Sequence[torch.Tensor],
        lengths_by_table: Optional[Sequence[Sequence[int]]],
        unique: Optional[UniqueKeys],
    ) -> torch.Tensor:
        rows, found = group.train_lookup(keys, tables, counts, lengths_by_table, unique)
        ctx.save_for_backward(found.slots, *found.unique.tensors())
        ctx.generation, ctx.number = found.generation, found.number
        ctx.group, ctx.weights, ctx.trained = group, weights, requires_grad(weights)
        return rows

    @staticmethod
    @eager
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[None, ...]:
        slots, *unique = ctx.saved_tensors
        found = TrainingLookup(UniqueKeys(*unique), slots, ctx.generation, ctx.number)
        # As for any leaf: what is frozen takes no gradient, whether that happened before the forward pass or after it.
        trained = [before and now for before, now in zip(ctx.trained, requires_grad(ctx.weights), strict=True)]
        ctx.group.apply_gradients(found, gradients, None if all(trained) else trained)
        return None, None, None, None, None, None, None, None


def lookup(
    group: TableGroup,
    anchor: torch.Tensor,
    keys: torch.Tensor,
    tables: torch.Tensor,
    counts: Optional[torch.Tensor],
    training: bool,
    weights: Sequence[torch.Tensor] = (),
    lengths_by_table: Optional[Sequence[Sequence[int]]] = None,
    unique: Optional[UniqueKeys] = None,
) -> torch.Tensor:
    """Rows of a batch of keys.

    Args:
        group: the tables.
        anchor: a tensor that requires a gradient, so that autograd comes back to the table; it never gets one. One that
            requires none: nothing is updated.
        keys: int64 [N], owned by this rank.
        tables: int32 [N], table of each key.
        counts: int64 [N], occurrences that each entry stands for; None: one each.
        training: insert absent keys, touch scores and update on the way back; otherwise change nothing.
        weights: a leaf for each table of the group, whose ``requires_grad`` now and at the update decides whether the
            table takes it; none: all tables take it.
        lengths_by_table: what the host knows of the order of the keys, see :func:`~dynamicemb.kernels.dedup.dedup`.
        unique: the keys deduplicated, where that has been done before.

    Returns:
        float32 [N, dim]. They require a gradient if ``training`` and ``anchor`` do.
    """
    with torch._C.DisableTorchFunctionSubclass():
        trains = training and anchor.requires_grad
    if trains:
        return _Lookup.apply(anchor, group, keys, tables, counts, weights, lengths_by_table, unique)
    with torch.no_grad():
        if not training:
            return group.eval_lookup(keys, tables)
        return group.train_lookup(keys, tables, counts, lengths_by_table, unique)[0]


class _WithoutUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


def without_update(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as part of a graph: they require a gradient, which changes nothing when it arrives. Copies nothing."""
    return _WithoutUpdate.apply(torch.empty(0, requires_grad=True), rows)


class _Expand(torch.autograd.Function):
    """Rows of distinct keys to rows of a batch; the way back sums in batch order, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
        ctx.save_for_backward(*unique.tensors())
        return gather_rows(rows, unique.inverse)

    @staticmethod
    @eager
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return segment_sum(gradients, UniqueKeys(*ctx.saved_tensors)), None  # autograd converts it to the rows' dtype


def expand(rows: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """The row of each key of a batch.

    Args:
        rows: float32, float16 or bfloat16 [U, dim], a row for each distinct key.
        unique: the batch.

    Returns:
        [N, dim] in the dtype of ``rows``; its gradient is summed over equal keys in batch order, in float32.
    """
    return _Expand.apply(rows, unique)
