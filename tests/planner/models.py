"""Models, sharders and topologies that the planner's tests share. Nothing here allocates rows."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from dynamicemb import DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbParameterConstraints

BATCH_SIZE = 32
GIB = 1024**3


def config(name: str, num_embeddings: int = 1000, dim: int = 16, **fields) -> EmbeddingConfig:
    fields.setdefault("feature_names", [f"{name}_feature"])
    return EmbeddingConfig(name=name, num_embeddings=num_embeddings, embedding_dim=dim, **fields)


def collection(*configs: EmbeddingConfig) -> EmbeddingCollection:
    return EmbeddingCollection(tables=list(configs), device=torch.device("meta"))


class Model(nn.Module):
    """Two collections of different widths, a dense layer, and bags if asked for."""

    def __init__(self, bags: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.wide = collection(
            config("item", feature_names=["clicked", "bought"]), config("user"), config("country", num_embeddings=200)
        )
        self.narrow = collection(config("tag", dim=8))
        if bags:
            table = EmbeddingBagConfig(name="bag", num_embeddings=100, embedding_dim=8, feature_names=["b"])
            self.bags = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))


def sharders(fused_params: dict | None = None) -> list:
    return [EmbeddingCollectionSharder(fused_params=fused_params), EmbeddingBagCollectionSharder()]


def topology(world_size: int = 2, compute_device: str = "cpu", **capacities: int) -> Topology:
    return Topology(world_size=world_size, local_world_size=world_size, compute_device=compute_device, **capacities)


def dynamic(options: DynamicEmbTableOptions | None = None, **fields) -> DynamicEmbParameterConstraints:
    return DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=options, **fields)
