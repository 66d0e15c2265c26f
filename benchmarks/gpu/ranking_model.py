"""The model of 26 features: embeddings of either side, and a dense part that both share in shape and first weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gpu.ids import Batch

__all__ = ["DENSE_INPUTS", "DensePart", "Rows", "Sample", "Trainer"]

DENSE_INPUTS = 13
DENSE_RATE = 0.01
#: From a batch of F tables to rows [F * B, dim].
Rows = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """A batch of B rows: dense float32 [B, 13], an id for each of F features, label float32 [B]."""

    dense: torch.Tensor
    batch: Batch
    label: torch.Tensor

    def copy_from(self, other: Sample) -> None:
        """Does not synchronise."""
        self.dense.copy_(other.dense)
        self.batch.ids.copy_(other.batch.ids)
        self.label.copy_(other.label)

    def clone(self) -> Sample:
        return Sample(self.dense.clone(), Batch(self.batch.ids.clone(), self.batch.tables), self.label.clone())


class DensePart(nn.Module):
    """Log-odds from dense inputs and vectors, by pairwise products as in DLRM (Naumov et al., 2019).

    Args:
        features: number of vectors.
        dim: of a vector.
        bottom, top: widths of the hidden layers.
        device: of the weights.
    """

    pairs: torch.Tensor  # int64 [pairs], places of the upper triangle in a flattened matrix of products

    def __init__(
        self, features: int, dim: int, bottom: Sequence[int], top: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        vectors = features + 1
        self.bottom = _layers([DENSE_INPUTS, *bottom, dim], device)
        self.top = _layers([dim + vectors * (vectors - 1) // 2, *top], device)
        self.output = nn.Linear(top[-1], 1, device=device)
        pairs = torch.triu_indices(vectors, vectors, offset=1, device=device)
        self.register_buffer("pairs", pairs[0] * vectors + pairs[1], persistent=False)

    def forward(self, dense: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """``dense`` float32 [B, 13], ``vectors`` float32 [B, F, dim]. Returns float32 [B]."""
        bottom = self.bottom(dense)
        vectors = torch.cat([bottom.unsqueeze(1), vectors], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        logits: torch.Tensor = self.output(self.top(torch.cat([bottom, products], dim=1))).squeeze(1)
        return logits


def _layers(widths: Sequence[int], device: torch.device) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out, device=device), nn.ReLU()]
    return nn.Sequential(*layers)


class Trainer:
    """One side: where rows come from in training and in evaluation, and its dense part.

    The step is made so that it can be captured: nothing in it waits, and gradients are made anew each time.
    """

    def __init__(self, train: Rows, read: Rows, dense_part: DensePart, features: int) -> None:
        self._train, self._read, self._dense_part, self._features = train, read, dense_part, features
        self._optimizer = torch.optim.SGD(dense_part.parameters(), lr=DENSE_RATE)

    def _loss(self, rows: torch.Tensor, sample: Sample) -> torch.Tensor:
        vectors = rows.view(self._features, sample.label.numel(), -1).transpose(0, 1)
        logits = self._dense_part(sample.dense, vectors)
        return nn.functional.binary_cross_entropy_with_logits(logits, sample.label)

    def forward(self, sample: Sample) -> torch.Tensor:
        """The loss, from which the way back updates the tables."""
        self._optimizer.zero_grad(set_to_none=True)
        return self._loss(self._train(sample.batch), sample)

    def backward(self, loss: torch.Tensor) -> None:
        """Updates tables and dense part."""
        loss.backward()
        self._optimizer.step()

    def loss_now(self, sample: Sample) -> float:
        """The loss, changing nothing. Synchronises."""
        with torch.no_grad():
            return self._loss(self.rows_now(sample), sample).item()

    def rows_now(self, sample: Sample) -> torch.Tensor:
        """Rows of the sample's ids, changing nothing."""
        with torch.no_grad():
            return self._read(sample.batch)
