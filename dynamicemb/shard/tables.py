"""The dynamic tables of a model, and how they are called: by names that do not depend on how the model is wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Optional

import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from dynamicemb.shard.collection import ShardedDynamicEmbeddingCollection
from dynamicemb.shard.collective import collective
from dynamicemb.shard.lookup import GroupModule
from dynamicemb.shard.optimizer import DynamicFusedOptimizer
from dynamicemb.table.group import TableGroup

__all__ = ["DynamicTable", "all_ranks", "dynamic_collections", "dynamic_tables"]

#: What the model itself is called in the path of a collection.
_MODEL = "model"


@dataclass(frozen=True)
class DynamicTable:
    """A dynamic table of a model.

    Attributes:
        collection: path of its collection, such as ``model.embeddings``; see :func:`dynamic_collections`.
        name: the table's own.
        group, index: where it is.
        process_group: the ranks that share it; None for a single process without one.
        optimizer: what torchrec sees of the optimizer of its group.
    """

    collection: str
    name: str
    group: TableGroup
    index: int
    process_group: Optional[dist.ProcessGroup]
    optimizer: DynamicFusedOptimizer

    @property
    def path(self) -> str:
        return f"{self.collection}/{self.name}"


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        inner = getattr(get_unwrapped_module(module), "_orig_mod", get_unwrapped_module(module))  # torch.compile
        if inner is module:
            return module
        module = inner


def dynamic_collections(model: nn.Module) -> Iterator[tuple[str, ShardedDynamicEmbeddingCollection]]:
    """Every sharded collection that has dynamic tables, with its path.

    The path is that of the module in the model as its author wrote it, the model itself being called ``model``: the
    wrappers of ``DistributedModelParallel``, data parallelism and ``torch.compile`` do not appear in it.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, ShardedDynamicEmbeddingCollection]]:
        module = _unwrapped(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, ShardedDynamicEmbeddingCollection):
            if module.dynamic_lookup is not None:
                yield path, module
            return
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}")

    yield from walk(model, _MODEL)


def dynamic_tables(model: nn.Module) -> list[DynamicTable]:
    """Every dynamic table of ``model``, in the same order on every rank."""
    tables = []
    for path, collection in dynamic_collections(model):
        lookup = collection.dynamic_lookup
        assert lookup is not None
        for module in lookup.group_modules:
            assert isinstance(module, GroupModule)
            for index, config in enumerate(module.group.configs):
                tables.append(
                    DynamicTable(path, config.name, module.group, index, lookup.process_group, module.fused_optimizer)
                )
    return tables


@contextmanager
def all_ranks(call: str, tables: Iterable[DynamicTable]) -> Iterator[None]:
    """Lets the body begin when all ranks that share any of the tables have come to ``call``.

    Raises:
        CollectiveError: see :func:`~dynamicemb.shard.collective.collective`.
    """
    groups = dict.fromkeys(table.process_group for table in tables)
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(collective(call, group))
        yield
