"""A DLRM-style model: bottom MLP, embeddings, pairwise dot products, top MLP (Naumov et al., 2019)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


class DLRM(nn.Module):
    """Log-odds of a click.

    Args:
        embeddings: one table of the same width D for each feature, features named as their tables.
        num_dense: dense inputs of a row.
        dense_device: device of everything but ``embeddings``.
    """

    pairs: torch.Tensor  # int64 [pairs], places of the upper triangle in a flattened matrix of dot products

    def __init__(self, embeddings: EmbeddingCollection, num_dense: int, dense_device: torch.device) -> None:
        super().__init__()
        self.embeddings = embeddings
        configs: Sequence[EmbeddingConfig] = embeddings.embedding_configs()
        self.features = [config.name for config in configs]
        self.dim = configs[0].embedding_dim
        vectors = len(self.features) + 1
        self.bottom = _mlp([num_dense, 64, self.dim], dense_device)
        self.top = _mlp([self.dim + vectors * (vectors - 1) // 2, 128, 64], dense_device)
        self.output = nn.Linear(64, 1, device=dense_device)
        pairs = torch.triu_indices(vectors, vectors, offset=1, device=dense_device)
        self.register_buffer("pairs", pairs[0] * vectors + pairs[1], persistent=False)

    def forward(self, dense: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
        """``dense`` float32 [B, num_dense], ``sparse`` with at most one id per row and feature. Returns float32 [B]."""
        bottom = self.bottom(dense)
        vectors = torch.cat([bottom.unsqueeze(1), self._bags(self.embeddings(sparse), dense.size(0))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.output(self.top(torch.cat([bottom, products], dim=1))).squeeze(1)

    def _bags(self, rows: dict[str, JaggedTensor], batch_size: int) -> torch.Tensor:
        """[B, features, D]; an empty bag is a vector of zeros."""
        values = torch.cat([rows[feature].values() for feature in self.features])
        lengths = torch.cat([rows[feature].lengths() for feature in self.features])
        padded = JaggedTensor(values, lengths=lengths).to_padded_dense(desired_length=1)
        return padded.view(len(self.features), batch_size, self.dim).transpose(0, 1)


def _mlp(widths: Sequence[int], device: torch.device) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out, device=device), nn.ReLU()]
    return nn.Sequential(*layers)
