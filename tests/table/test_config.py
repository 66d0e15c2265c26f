"""A table as the table layer sees it: from options to sizes, and which tables may share a group."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dynamicemb import (
    DynamicEmbCheckMode,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
)
from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.table.config import TableConfig
from dynamicemb.table.optimizers import OptimizerConfig
from tests.table.groups import NORMAL, config

UNIFORM = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.UNIFORM, lower=-1.0, upper=1.0)


def test_every_option_arrives() -> None:
    optimizer = OptimizerConfig(OptimizerKind.ADAM, learning_rate=0.5)
    options = DynamicEmbTableOptions(
        dim=24, embedding_dtype=torch.bfloat16, max_capacity=500, init_capacity=100, bucket_capacity=32,
        max_load_factor=0.75, evict_strategy=DynamicEmbEvictStrategy.LFU, initializer_args=UNIFORM,
        eval_initializer_args=NORMAL, safe_check_mode=DynamicEmbCheckMode.ERROR, seed=11,
    )  # fmt: skip
    assert TableConfig.from_options("item", options, optimizer) == TableConfig(
        name="item", dim=24, embedding_dtype=torch.bfloat16, max_capacity=500, init_capacity=100, bucket_capacity=32,
        max_load_factor=0.75, evict_strategy=DynamicEmbEvictStrategy.LFU, initializer=UNIFORM, eval_initializer=NORMAL,
        safe_check_mode=DynamicEmbCheckMode.ERROR, seed=11, optimizer=optimizer,
    )  # fmt: skip


def test_defaults() -> None:
    options = DynamicEmbTableOptions(dim=8, embedding_dtype=torch.float32, max_capacity=500, initializer_args=UNIFORM)
    table = TableConfig.from_options("item", options, OptimizerConfig())
    assert table.init_capacity == 500
    assert table.missing_reads_as_zeros
    assert table.geometry().slots == table.geometry().max_slots == 512
    assert table.layout == RowLayout(8, torch.float32, OptimizerKind.SGD)


@pytest.mark.parametrize(
    ("max_capacity", "init_capacity", "slots", "max_slots"),
    [
        (1, 1, 8, 8),
        (64, 1, 8, 64),
        (64, 64, 64, 64),
        (64, 9, 16, 64),
        (72, 1, 8, 72),
        (72, 60, 72, 72),
        (65, 30, 40, 72),
    ],
)
def test_sizes(max_capacity: int, init_capacity: int, slots: int, max_slots: int) -> None:
    """Whole buckets; at first the smallest size that leads to the full one by doubling and holds init_capacity."""
    geometry = config(capacity=max_capacity, init_capacity=init_capacity).geometry()
    assert (geometry.slots, geometry.max_slots) == (slots, max_slots)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"}, {"max_capacity": 999}, {"init_capacity": 8}, {"initializer": UNIFORM}, {"seed": 3},
        {"eval_initializer": NORMAL}, {"safe_check_mode": DynamicEmbCheckMode.ERROR}, {"max_load_factor": 0.9},
        {"optimizer": OptimizerConfig(learning_rate=3.0, weight_decay=0.5)},
    ],
)  # fmt: skip
def test_tables_that_may_share_a_group(change: dict[str, Any]) -> None:
    assert dataclasses.replace(config(), **change).group_key == config().group_key


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 8}, {"embedding_dtype": torch.float16}, {"bucket_capacity": 16},
        {"evict_strategy": DynamicEmbEvictStrategy.CUSTOMIZED}, {"optimizer": OptimizerConfig(OptimizerKind.ADAM)},
        {"optimizer": OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD)},
    ],
)  # fmt: skip
def test_tables_that_may_not(change: dict[str, Any]) -> None:
    assert dataclasses.replace(config(), **change).group_key != config().group_key


@pytest.mark.parametrize(
    ("args", "zeros"),
    [
        (NORMAL, False),
        (UNIFORM, False),
        (DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=0.0), True),
        (DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=0.1), False),
        (DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.DEBUG), False),
    ],
)
def test_missing_reads_as_zeros(args: DynamicEmbInitializerArgs, zeros: bool) -> None:
    assert config(eval_initializer=args).missing_reads_as_zeros is zeros
