"""Groups for the tests of the table layer, and lookups as the autograd function makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.config import TableConfig
from dynamicemb.table.function import lookup
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig

CPU = torch.device("cpu")
DIM = 4
NORMAL = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL)
ZEROS = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT)
#: Learning rate 1 and rows that begin at zero: a row is the negative sum of its gradients, exactly.
SGD = OptimizerConfig(kind=OptimizerKind.SGD, learning_rate=1.0)


def config(name: str = "item", capacity: int = 64, **fields: Any) -> TableConfig:
    """A table in buckets of eight that does not grow, with rows of zeros and plain SGD."""
    fields = {"bucket_capacity": 8, "initializer": ZEROS, "optimizer": SGD, "init_capacity": capacity, **fields}
    return TableConfig(name, fields.pop("dim", DIM), capacity, **fields)


def group_of(*configs: TableConfig) -> TableGroup:
    return TableGroup(configs or (config(),), 1, CPU)


def keys_and_tables(keys: Sequence[int], table: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(list(keys), dtype=torch.int64), torch.full((len(keys),), table, dtype=torch.int32)


def train(group: TableGroup, keys: Sequence[int], table: int = 0) -> torch.Tensor:
    """Rows of a training lookup, [len(keys), dim], that lead back to the table."""
    anchor = torch.empty(0, requires_grad=True)
    return lookup(group, anchor, *keys_and_tables(keys, table), None, training=True)


def read(group: TableGroup, keys: Sequence[int], table: int = 0) -> list[float]:
    """First column of the rows in evaluation; all columns are alike in these tests."""
    rows = group.eval_lookup(*keys_and_tables(keys, table))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    return rows[:, 0].tolist()
