"""What an update makes of rows, in float64 with torch's own operations: the check of the benchmark of that kernel."""

from __future__ import annotations

import torch

from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["embeddings_of", "states_of", "updated"]


def embeddings_of(rows: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """[R, dim] in the table's dtype, from the bytes of rows (uint8 [R, row_bytes]); a view."""
    return rows[:, : layout.dim * layout.embedding_dtype.itemsize].view(layout.embedding_dtype)


def states_of(rows: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """float32 [R, state width]; a view."""
    begin = layout.state_offset_bytes
    return rows[:, begin : begin + 4 * layout.state_width].view(torch.float32)


def updated(
    weights: torch.Tensor, states: torch.Tensor, gradients: torch.Tensor, optimizer: OptimizerConfig, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and states after one update; formulas: :mod:`dynamicemb.table.optimizers`, without weight decay.

    Args:
        weights: float64 [R, dim].
        states: float64 [R, state width].
        gradients: float64 [R, dim], summed over equal ids.
        optimizer: its rule and numbers.
        step: Adam's t, this update included.
    """
    kind, rate, dim = optimizer.kind, optimizer.learning_rate, weights.shape[1]
    if kind is OptimizerKind.SGD:
        return weights - rate * gradients, states
    if kind is OptimizerKind.ADAGRAD:
        sums = states + gradients * gradients
        return weights - rate * gradients / (sums.sqrt() + optimizer.eps), sums
    if kind is OptimizerKind.ROWWISE_ADAGRAD:
        sums = states + (gradients * gradients).mean(1, keepdim=True)
        return weights - rate * gradients / (sums.sqrt() + optimizer.eps), sums
    mean = optimizer.beta1 * states[:, :dim] + (1 - optimizer.beta1) * gradients
    square = optimizer.beta2 * states[:, dim:] + (1 - optimizer.beta2) * gradients * gradients
    unbiased_mean, unbiased_square = mean / (1 - optimizer.beta1**step), square / (1 - optimizer.beta2**step)
    return weights - rate * unbiased_mean / (unbiased_square.sqrt() + optimizer.eps), torch.cat([mean, square], 1)
