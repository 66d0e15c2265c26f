"""Imported once by the process that test ranks are forked from: the slow imports, and the kernels loaded into memory.

No thread may be started here, because a forked process would have none of them: one thread, and nothing asynchronous.
"""

from __future__ import annotations

import warnings

import torch

torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside torch and torchrec, as in pyproject.toml
    import pytest  # noqa: F401
    import torch.distributed.optim
    import torchrec.distributed.train_pipeline  # noqa: F401

    import dynamicemb.planner
    import dynamicemb.shard  # noqa: F401
    from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
    from dynamicemb.kernels.engine import engine_name
    from dynamicemb.kernels.layout import OptimizerKind
    from dynamicemb.table.config import TableConfig
    from dynamicemb.table.group import TableGroup
    from dynamicemb.table.optimizers import OptimizerConfig


def _use_kernels() -> None:
    initializer = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL)
    for kind in OptimizerKind:
        config = TableConfig(
            "warm", 4, 64, 8, bucket_capacity=8, evict_strategy=DynamicEmbEvictStrategy.LFU, initializer=initializer,
            eval_initializer=initializer, optimizer=OptimizerConfig(kind=kind),
        )  # fmt: skip
        group = TableGroup([config], 1, torch.device("cpu"))
        keys, tables = torch.arange(16), torch.zeros(16, dtype=torch.int32)
        rows, lookup = group.train_lookup(keys, tables, torch.ones_like(keys))
        group.apply_gradients(lookup, rows)
        group.eval_lookup(keys, tables)
        group.stored_rows(0)


if engine_name(torch.device("cpu")) == "cpu":
    _use_kernels()
