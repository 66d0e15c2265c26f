"""Models, batches and ways to look into tables that the tests of sharding share. Everything here runs on a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import ModuleSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode, DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterConstraints
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, ShardedDynamicEmbeddingCollection
from dynamicemb.table.group import TableGroup

CPU = torch.device("cpu")
NORMAL = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL)
#: Rows that start at zero: with learning rate 1 a row is the negative sum of its gradients, exactly.
ZEROS = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT)
#: A torchrec table that is divided over all ranks, as dynamic ones are.
STATIC = ParameterConstraints(sharding_types=["row_wise"])


def rank_device() -> torch.device:
    """Where this rank's tables are: on its GPU if the ranks are joined by NCCL, else in host memory."""
    joined_by_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if joined_by_nccl else CPU


def table(name: str, num_embeddings: int = 1000, dim: int = 8, features: Sequence[str] = ()) -> EmbeddingConfig:
    """A table whose only feature has its name, unless others are given."""
    return EmbeddingConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=list(features) or [name]
    )


def collection(*tables: EmbeddingConfig) -> EmbeddingCollection:
    return EmbeddingCollection(tables=list(tables), device=torch.device("meta"))


def dynamic(**options: Any) -> DynamicEmbParameterConstraints:
    return DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=DynamicEmbTableOptions(**options))


def distribute(
    module: nn.Module,
    constraints: Mapping[str, ParameterConstraints],
    optimizer: Optional[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = None,
    sharder: Optional[ModuleSharder] = None,
    group: Optional[dist.ProcessGroup] = None,
    plain: bool = False,
) -> DistributedModelParallel:
    """The model as users distribute it over ``group`` (default: all ranks).

    Args:
        module: its embedding parameters get ``optimizer`` in the backward pass.
        constraints: for the planner.
        optimizer: class and arguments; None: what the sharder's fused parameters say.
        sharder: default: dynamicemb's without arguments.
        group: the ranks.
        plain: with torchrec's own planner and sharder instead.
    """
    if optimizer is not None:
        embeddings = [part for part in module.modules() if isinstance(part, EmbeddingCollection)]
        for part in embeddings:
            apply_optimizer_in_backward(optimizer[0], part.parameters(), dict(optimizer[1]))
    group = group or dist.group.WORLD
    device = rank_device()
    topology = Topology(world_size=group.size(), local_world_size=group.size(), compute_device=device.type)
    planner_class = EmbeddingShardingPlanner if plain else DynamicEmbeddingShardingPlanner
    planner = planner_class(topology=topology, constraints=dict(constraints), debug=False)
    default_class = EmbeddingCollectionSharder if plain else DynamicEmbeddingCollectionSharder
    sharders = [sharder or default_class()]
    plan = planner.collective_plan(module, sharders, group)
    return DistributedModelParallel(module, env=_environment(group), device=device, plan=plan, sharders=sharders)


def _environment(group: dist.ProcessGroup) -> ShardingEnv:
    if group is dist.group.WORLD:
        return ShardingEnv.from_process_group(group)
    # torchrec would build a device mesh over as many ranks, but from rank 0 on, and wait for ranks of no such group.
    env = ShardingEnv.from_local(group.size(), group.rank())
    env.process_group = group
    return env


def features_of(values_by_feature: Mapping[str, Iterable[Sequence[int]]], dtype: torch.dtype = torch.int64):
    """A batch from the ids of each sample of each feature: ``{"item": [[1, 2], [], [3]]}`` has three samples."""
    samples = {feature: [list(ids) for ids in samples] for feature, samples in values_by_feature.items()}
    values = [value for ids_by_sample in samples.values() for ids in ids_by_sample for value in ids]
    lengths = [len(ids) for ids_by_sample in samples.values() for ids in ids_by_sample]
    return KeyedJaggedTensor(
        keys=list(samples), values=torch.tensor(values, dtype=dtype), lengths=torch.tensor(lengths, dtype=torch.int64)
    )


def one_sample(ids_by_feature: Mapping[str, torch.Tensor]) -> KeyedJaggedTensor:
    """A batch of a single sample that has all the ids."""
    return KeyedJaggedTensor(
        keys=list(ids_by_feature),
        values=torch.cat(list(ids_by_feature.values())),
        lengths=torch.tensor([ids.numel() for ids in ids_by_feature.values()], dtype=torch.int64),
    )


def rows(model: nn.Module, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
    """What a batch reads as, [ids of the feature, dim] by feature. All ranks call it together."""
    output = model(features.to(rank_device()))
    output = output if isinstance(output, dict) else output.wait()
    return {feature: jagged.values() for feature, jagged in output.items()}


def evaluated(model: nn.Module, ids_by_feature: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of ids in evaluation; the model is in the mode that it was in afterwards. All ranks call it together."""
    training = model.training
    model.eval()
    result = {feature: values.detach() for feature, values in rows(model, one_sample(ids_by_feature)).items()}
    model.train(training)
    return result


def train_step(model: nn.Module, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
    """A step whose gradient is 1 everywhere. Returns the rows that the forward pass read."""
    output = rows(model, features)
    torch.stack([values.sum() for values in output.values()]).sum().backward()
    return {feature: values.detach().clone() for feature, values in output.items()}


def groups(model: nn.Module) -> list[TableGroup]:
    """This rank's part of the dynamic tables."""
    collections = [part for part in model.modules() if isinstance(part, ShardedDynamicEmbeddingCollection)]
    return [group for part in collections if part.dynamic_lookup is not None for group in part.dynamic_lookup.groups]


def local_table(model: nn.Module, name: str) -> tuple[TableGroup, int]:
    """The group that holds a table, and the table's place in it."""
    for group in groups(model):
        for index, config in enumerate(group.configs):
            if config.name == name:
                return group, index
    raise AssertionError(f"no table {name}")
