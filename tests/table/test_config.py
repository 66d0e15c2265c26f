"""A table as the table layer sees it: from options to sizes, and which tables may share a group."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dynamicemb import (
    ConfigError,
    DynamicEmbCheckMode,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
)
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.table.config import TableConfig
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig
from dynamicemb.table.storage import GroupStorage
from tests.table.groups import CPU, NORMAL, config, keys_and_tables

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


FAR = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=1e5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 6}, "dim=6 is not a positive multiple of 4; use 8"),
        ({"dim": 0}, "dim=0 is not a positive multiple"),
        ({"dim": -1}, "dim=-1 is not given"),
        ({"dim": 1028}, "dim=1028 is above 1024"),
        ({"dim": 8.0}, "dim=8.0 is not a positive integer"),
        ({"embedding_dtype": torch.float64}, "embedding_dtype=torch.float64 is not supported"),
        ({"embedding_dtype": None}, "embedding_dtype=None is not given"),
        ({"capacity": 0}, "max_capacity=0 is not a positive integer"),
        ({"capacity": 2**41}, "max_capacity=2199023255552 is above"),
        ({"init_capacity": 65}, "init_capacity=65 is above max_capacity=64"),
        ({"init_capacity": None}, "init_capacity=None is not given"),
        ({"bucket_capacity": 12}, "bucket_capacity=12 is not supported"),
        ({"max_load_factor": 0.0}, "max_load_factor=0.0 is outside"),
        ({"evict_strategy": "lru"}, "evict_strategy='lru' is not a DynamicEmbEvictStrategy"),
        ({"initializer": None}, "initializer_args=None is not a DynamicEmbInitializerArgs"),
        ({"eval_initializer": 0.0}, "eval_initializer_args=0.0 is not a DynamicEmbInitializerArgs"),
        ({"safe_check_mode": 7}, "safe_check_mode=7 is not a DynamicEmbCheckMode"),
        ({"seed": 2**64}, "seed=18446744073709551616 is not an integer that fits"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is not an OptimizerConfig"),
        ({"embedding_dtype": torch.float16, "initializer": FAR}, "value=100000.0 is outside the range of"),
        ({"embedding_dtype": torch.float16, "eval_initializer": FAR}, "value=100000.0 is outside the range of"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_take_is_refused_where_it_is_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"table 'item': .*{message}"):
        config(**change)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(ConfigError, match="the name of a table is"):
        config(name)


def test_bounds_that_are_not_given_are_those_of_a_table_of_its_capacity() -> None:
    table = TableConfig("t", dim=8, max_capacity=400, init_capacity=400)
    assert (table.initializer.lower, table.initializer.upper) == (-0.05, 0.05)
    rows, _ = TableGroup([table], 1, CPU).train_lookup(*keys_and_tables(range(100)), None)
    assert rows.abs().max() <= 0.05 and rows.std() > 0.02
    options = DynamicEmbTableOptions(dim=8, embedding_dtype=torch.float32, max_capacity=400)
    assert TableConfig.from_options("t", options, OptimizerConfig()).initializer == table.initializer
    assert options.initializer_args.lower is None, "arguments that a user passed in are never modified"


def test_a_table_does_not_follow_later_assignments() -> None:
    initializer = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=1.0)
    table = config(initializer=initializer)
    before = hash(table)
    initializer.value = 2.0
    assert table.initializer.value == 1.0 and hash(table) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, torch.float32, OptimizerKind.SGD), "dim=6 is not a positive multiple of 4; use 8"),
        ((8, torch.int8, OptimizerKind.SGD), "embedding_dtype=torch.int8 is not supported"),
        ((8, torch.float32, "adam"), "optimizer='adam' is not an OptimizerKind"),
    ],
)
def test_layouts_that_cannot_be(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowLayout(*arguments)


def test_sizes_that_cannot_be() -> None:
    for arguments, message in (((64, 64, 12), "bucket_capacity=12"), ((0, 0, 8), "0 rows, 0"), ((8, -1, 8), "-1 at")):
        with pytest.raises(ConfigError, match=message):
            TableGeometry.create(*arguments)
    for fields in ((0, 0, 0, 8), (1, -1, 0, 8), (1, 0, 32, 8)):
        with pytest.raises(ConfigError, match=r"cannot be; a table has 1 bucket or more"):
            TableGeometry(*fields)
    layout, sizes = RowLayout(8, torch.float32, OptimizerKind.SGD), [TableGeometry(1, 0, 0, 8)]
    for geometries, ranks, message in (
        ([], 1, r"these have \[\]"),
        ([*sizes, TableGeometry(1, 0, 0, 16)], 1, r"one bucket_capacity, and these have \[8, 16\]"),
        (sizes, 0, "world_size=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            GroupStorage(geometries, layout, ranks, CPU)
    with pytest.raises(ConfigError, match=r"tables \['a', 'b'\] cannot share a group"):
        TableGroup([config("a"), config("b", dim=8)], 1, CPU)
