"""Small sharded models, their training, and what is in their tables, for the tests of checkpoints. Runs on a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.optim import SGD as TorchrecSGD  # noqa: N811
from torchrec.optim import Adagrad as TorchrecAdagrad
from torchrec.optim import Adam, RowWiseAdagrad

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import set_score
from dynamicemb.shard.tables import dynamic_tables
from tests.shard.models import NORMAL, collection, distribute, dynamic, one_sample, table

OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (TorchrecSGD, {"lr": 0.1}),
    "adagrad": (TorchrecAdagrad, {"lr": 0.1}),
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.1}),
    "adam": (Adam, {"lr": 0.01}),
}


class Model(nn.Module):
    """A collection, and a parameter that is none of it."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, features: Any) -> torch.Tensor:
        rows = [jagged.values() for jagged in self.embeddings(features).values()]
        return sum((row * torch.arange(1, row.shape[1] + 1)).sum() for row in rows) * self.scale


def model(
    optimizer: str = "rowwise_adagrad",
    tables: int = 3,
    dim: int = 8,
    capacity: int = 512,
    strategy: DynamicEmbEvictStrategy = DynamicEmbEvictStrategy.LRU,
    **options: Any,
) -> nn.Module:
    """A distributed model with dynamic tables ``t0``, ``t1`` …, of which ``t2`` is in a group of its own."""
    names = [f"t{number}" for number in range(tables)]
    options = {"evict_strategy": strategy, "bucket_capacity": 16, "initializer_args": NORMAL, **options}
    constraints = {name: dynamic(**{**options, **({"bucket_capacity": 8} if name == "t2" else {})}) for name in names}
    embeddings = collection(*(table(name, capacity, dim) for name in names))
    return distribute(Model(embeddings), constraints, optimizer=OPTIMIZERS[optimizer])


def batch(names: Sequence[str], step: int, rank: int, ids: int = 60, distinct: int = 2000) -> Any:
    """Ids of both signs, some of them often, different on every rank and in every step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    by_name = {}
    for name in names:
        numbers = torch.randint(distinct, (ids,), generator=generator)
        rare = torch.rand(ids, generator=generator) < 0.5
        by_name[name] = torch.where(rare, numbers, numbers % 40) * 6364136223846793005 - 7
    return one_sample(by_name)


def train(
    module: nn.Module, steps: range, rank: int, world_size: int, custom: bool = False, **options: Any
) -> list[float]:
    """Losses of the steps, exactly."""
    names = [one.name for one in dynamic_tables(module)]
    names.sort()
    module.train()
    losses = []
    for step in steps:
        if custom:
            set_score(module, (step * 7) % 11)
        loss = module(batch(names, step, rank, **options))
        (loss * loss.detach().sign() * 1e-2).backward()
        losses.append(float(loss.detach()))
    return losses


def contents(module: nn.Module) -> dict[str, dict[int, tuple[Any, ...]]]:
    """Everything that this rank's tables hold: key -> (score, bytes of the row and of its states), by table."""
    result = {}
    for one in dynamic_tables(module):
        stored = one.group.stored_rows(one.index)
        rows = stored.embeddings.contiguous().view(torch.uint8).numpy()
        states = [state.contiguous().view(torch.uint8).numpy() for state in stored.states.values()]
        result[one.name] = {
            key: (score, rows[i].tobytes(), *(state[i].tobytes() for state in states))
            for i, (key, score) in enumerate(zip(stored.keys.tolist(), stored.scores.tolist()))
        }
    return result


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under ``folder`` but the manifest, by relative path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def joined(by_rank: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """What all ranks hold together; no key on two of them."""
    tables_of_all: dict[str, dict] = {}
    for tables in by_rank:
        for name, rows in tables.items():
            assert not set(rows) & set(tables_of_all.setdefault(name, {}))
            tables_of_all[name].update(rows)
    return tables_of_all
