"""Whether a plan is one for this collection and these ranks, found out before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

import torch.distributed as dist
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from dynamicemb.errors import ConfigError
from dynamicemb.planner.capacity import resolve_options
from dynamicemb.planner.constraints import DYNAMIC_KERNEL, DYNAMIC_SHARDING_TYPE
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding
from dynamicemb.shard.agreement import gathered, raise_on_all_ranks

__all__ = ["checked_plan"]

_REMEDY = "make the plan anew with DynamicEmbeddingShardingPlanner, from this model and for these ranks"


def checked_plan(
    module: Any, shardings: Mapping[str, ParameterSharding], env: ShardingEnv
) -> dict[str, ParameterSharding]:
    """``shardings`` with the options of dynamic tables resolved, after every check. Collective over the ranks of
    ``env`` that share the tables.

    Args:
        module: the collection that is being sharded.
        shardings: by table name.
        env: torchrec's; with 2D parallelism the ranks are those of one replica.

    Raises:
        ConfigError: a plan for another number of ranks or other tables, one that another planner has made, or different
            plans on different ranks.
        RemoteRankError: another rank has found one of these.
    """
    group: Optional[dist.ProcessGroup] = getattr(env, "sharding_pg", env.process_group)
    num_ranks = 1 if group is None else group.size()
    checked, error = dict(shardings), None
    try:
        for config in module.embedding_configs():
            checked[config.name] = _checked_entry(config, shardings.get(config.name), num_ranks)
        _check_names(module, shardings)
    except ConfigError as failure:
        error = failure
    _agree(checked, error, group)
    return checked


def _checked_entry(
    config: BaseEmbeddingConfig, sharding: Optional[ParameterSharding], num_ranks: int
) -> ParameterSharding:
    name = config.name
    if sharding is None:
        raise ConfigError(f"table '{name}' is not in the plan of its collection; {_REMEDY}")
    if not isinstance(sharding, DynamicEmbParameterSharding):
        if sharding.compute_kernel == DYNAMIC_KERNEL:
            raise ConfigError(
                f"table '{name}' is planned with the kernel of dynamic tables but without their options, as torchrec's "
                f"own planner does; {_REMEDY}"
            )
        return sharding
    if (sharding.sharding_type, sharding.compute_kernel) != (DYNAMIC_SHARDING_TYPE, DYNAMIC_KERNEL):
        raise ConfigError(
            f"table '{name}' is dynamic and planned as {sharding.sharding_type} with kernel "
            f"{sharding.compute_kernel}; dynamic tables are {DYNAMIC_SHARDING_TYPE} with kernel {DYNAMIC_KERNEL}: "
            f"{_REMEDY}"
        )
    if sharding.planned_ranks not in (None, num_ranks):
        raise ConfigError(
            f"table '{name}' is planned for {sharding.planned_ranks} ranks and being sharded on {num_ranks}, where its "
            f"capacity would be another; {_REMEDY}"
        )
    for field, own in (("table", name), ("num_embeddings", config.num_embeddings), ("data_type", config.data_type)):
        planned = getattr(sharding, field)
        if planned not in (None, own):
            raise ConfigError(f"table '{name}' is planned with {field}={planned}, and the model's is {own}; {_REMEDY}")
    return _with_resolved_options(config, sharding, num_ranks)


def _with_resolved_options(
    config: BaseEmbeddingConfig, sharding: DynamicEmbParameterSharding, num_ranks: int
) -> DynamicEmbParameterSharding:
    """Options that the planner has resolved stay as they are; what a plan made by hand leaves out is filled in."""
    try:
        options = resolve_options(config.name, config, sharding.dynamicemb_options, num_ranks)
    except ConfigError as error:
        raise ConfigError(f"the plan does not fit the model: {error}; {_REMEDY}") from error
    return dataclasses.replace(sharding, dynamicemb_options=options)


def _check_names(module: Any, shardings: Mapping[str, ParameterSharding]) -> None:
    known = {config.name for config in module.embedding_configs()}
    for name, sharding in shardings.items():
        if name not in known and isinstance(sharding, DynamicEmbParameterSharding):
            raise ConfigError(
                f"the plan has the dynamic table '{name}', and the collection has only {sorted(known)}; {_REMEDY}"
            )


def _agree(
    checked: Mapping[str, ParameterSharding], error: Optional[ConfigError], group: Optional[dist.ProcessGroup]
) -> None:
    """Raises on every rank what one of them has found, and if they have been given different plans."""
    dynamic = {
        name: repr(sharding.dynamicemb_options)
        for name, sharding in checked.items()
        if isinstance(sharding, DynamicEmbParameterSharding)
    }
    raise_on_all_ranks(error, group, "carry out its plan")
    plans = gathered(dynamic, group)
    for rank, others in enumerate(plans):
        if others != plans[0]:
            differing = sorted(name for name in {**others, **plans[0]} if others.get(name) != plans[0].get(name))
            raise ConfigError(
                f"ranks 0 and {rank} have different plans for the tables {differing}; make one plan for all ranks, as "
                "DynamicEmbeddingShardingPlanner.collective_plan does"
            )
