"""The model of the demo on all ranks: constraints, plan, sharding and optimizers. What a user of dynamicemb writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from demo_options import DemoOptions
from dlrm import DLRM
from ranks import Ranks
from rows import CATEGORICAL, DENSE
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from dynamicemb import ConfigError, DynamicEmbEvictStrategy, DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterConstraints
from dynamicemb.shard import DynamicEmbeddingCollectionSharder

#: Rows that a dynamic table starts with on each rank; it doubles until it has its capacity.
INITIAL_ROWS = 1_024
TABLE_OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class ShardedModel:
    """The model and the optimizer of its dense part; the tables' optimizers run in the backward pass.

    Attributes:
        dynamic_tables: names of the tables that are hash tables.
    """

    model: nn.Module
    dense_optimizer: torch.optim.Optimizer
    dynamic_tables: frozenset[str]


def build(options: DemoOptions, ranks: Ranks, device: torch.device) -> ShardedModel:
    """The sharded model on this rank. All ranks call it together.

    Raises:
        ConfigError: options that cannot be honoured, such as tables that do not fit in memory; on every rank.
    """
    static = [name for name in CATEGORICAL if name not in options.dynamic]
    if options.optimizer == "adam" and static and device.type == "cpu":
        raise ConfigError(
            "--optimizer adam: static tables have no Adam on the CPU; use --dynamic all, or another optimizer"
        )
    torch.manual_seed(options.seed)
    embeddings = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                feature_names=[name],
                num_embeddings=options.capacity,
                embedding_dim=options.embedding_dim,
            )
            for name in CATEGORICAL
        ],
        device=torch.device("meta"),
    )
    model = DLRM(embeddings, len(DENSE), device)
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[options.optimizer], embeddings.parameters(), {"lr": options.lr})
    sharder = DynamicEmbeddingCollectionSharder(use_index_dedup=True)
    plan = _plan(model, sharder, options, ranks, device)
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])
    dense_parameters = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    return ShardedModel(sharded, torch.optim.Adam(dense_parameters.values(), lr=options.dense_lr), options.dynamic)


def _plan(model: nn.Module, sharder: Any, options: DemoOptions, ranks: Ranks, device: torch.device) -> ShardingPlan:
    planner = DynamicEmbeddingShardingPlanner(
        topology=Topology(ranks.world_size, device.type, local_world_size=ranks.local_world_size),
        batch_size=-(-options.batch_size // ranks.world_size),
        constraints=_constraints(options, ranks.world_size),
        debug=False,
    )
    try:
        return planner.collective_plan(model, [sharder], dist.group.WORLD)
    except PlannerError as error:
        if error.error_type not in (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.PARTITION):
            raise
        # TorchRec's message has a line for each of the tables, which here are all alike.
        raise ConfigError(
            f"--capacity {options.capacity}, --embedding-dim {options.embedding_dim}: {len(CATEGORICAL)} such tables "
            f"do not fit into the memory of {ranks.world_size} rank(s); lower one of them, or use more ranks"
        ) from error


def _constraints(options: DemoOptions, world_size: int) -> dict[str, ParameterConstraints]:
    """One entry for each table. All that a dynamic table needs is ``use_dynamicemb=True``; the rest is a choice."""
    table_options = DynamicEmbTableOptions(
        init_capacity=min(INITIAL_ROWS, -(-options.capacity // world_size)),
        evict_strategy=DynamicEmbEvictStrategy(options.score),
        seed=options.seed,
    )
    dynamic = DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=table_options)
    static = DynamicEmbParameterConstraints(sharding_types=[ShardingType.ROW_WISE.value])
    return {name: dynamic if name in options.dynamic else static for name in CATEGORICAL}
