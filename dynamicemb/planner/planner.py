"""TorchRec's planner, with dynamic tables in the plan, in the memory budget and in what it prints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner.constants import DDR_CAP
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    Partitioner,
    PerfModel,
    PlannerError,
    PlannerErrorType,
    Proposer,
    Stats,
    StorageReservation,
    Topology,
)
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from dynamicemb.errors import ConfigError
from dynamicemb.planner.collective import decide_on_first_rank
from dynamicemb.planner.constraints import dynamic_options
from dynamicemb.planner.enumerator import DynamicEmbeddingEnumerator
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding
from dynamicemb.planner.stats import DynamicEmbeddingStats, format_bytes
from dynamicemb.planner.tables import (
    DynamicTable,
    check_eb_configs,
    dynamic_tables,
    table_sites,
    warn_about_what_has_no_effect,
)
from dynamicemb.table.memory import memory_of

__all__ = ["DynamicEmbeddingShardingPlanner"]

# Failures of torchrec's planner in which the memory of dynamic tables may have a part.
_MEMORY_ERRORS = (
    PlannerErrorType.INSUFFICIENT_STORAGE,
    PlannerErrorType.STRICT_CONSTRAINTS,
    PlannerErrorType.PARTITION,
)


class DynamicEmbeddingShardingPlanner(EmbeddingShardingPlanner):
    """Plans static tables as TorchRec does, and dynamic tables row-wise over all ranks.

    Args:
        eb_configs: configs of the model's tables. Not needed, because the model has them; if given, they are compared.
        topology: the devices; None: TorchRec's default, from the process group. On a CPU without a ``ddr_cap`` (or with
            128 GiB, TorchRec's default), the memory of this machine, divided by the ranks that share it, takes its
            place: a plan that it cannot hold is refused.
        batch_size: samples of a rank's batch; None: TorchRec's default.
        enumerator: a :class:`DynamicEmbeddingEnumerator` with the same constraints; None: one is made.
        storage_reservation, proposer, partitioner, performance_model: TorchRec's.
        stats: TorchRec's; None: those with an added table of the dynamic tables' memory.
        constraints: by table name; :class:`~dynamicemb.planner.DynamicEmbParameterConstraints` make tables dynamic.
            Never modified. None: those of ``enumerator``.
        debug: print the plan table by table.
        torchrec_options: further keyword arguments of :class:`EmbeddingShardingPlanner`.

    Raises:
        ConfigError: arguments that contradict each other, or a topology of GPUs on a machine without one.
    """

    #: What :class:`DynamicEmbeddingEnumerator` asks of a planner: options of dynamic tables reach the plan.
    plans_dynamic_tables = True

    def __init__(
        self,
        eb_configs: Optional[list[BaseEmbeddingConfig]] = None,
        topology: Optional[Topology] = None,
        batch_size: Optional[int] = None,
        enumerator: Optional[Enumerator] = None,
        storage_reservation: Optional[StorageReservation] = None,
        proposer: Optional[Union[Proposer, list[Proposer]]] = None,
        partitioner: Optional[Partitioner] = None,
        performance_model: Optional[PerfModel] = None,
        stats: Optional[Union[Stats, list[Stats]]] = None,
        constraints: Optional[dict[str, ParameterConstraints]] = None,
        debug: bool = True,
        **torchrec_options: Any,
    ) -> None:
        if constraints is None and isinstance(enumerator, DynamicEmbeddingEnumerator):
            constraints = enumerator.constraints
        self._eb_configs = _checked_eb_configs(eb_configs)
        _check_device(topology, constraints)
        _check_enumerator(enumerator, topology, constraints)
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=enumerator,
            storage_reservation=storage_reservation,
            proposer=proposer,
            partitioner=partitioner,
            performance_model=performance_model,
            stats=DynamicEmbeddingStats() if stats is None else stats,
            constraints=constraints,
            debug=debug,
            **torchrec_options,
        )
        # Private attributes of torchrec's planner: it fills in the defaults of topology and batch size, which our
        # enumerator needs, and it has no public way to tell them or to exchange the enumerator.
        self._enumerator: Enumerator
        self._topology: Topology
        self._measured_bytes = _memory_of_a_rank(self._topology)
        if self._measured_bytes is not None:
            self._topology = _with_host_memory(self._topology, self._measured_bytes)
        if enumerator is None:
            self._enumerator = DynamicEmbeddingEnumerator(self._topology, self._batch_size, constraints)
        elif topology is None:
            _check_enumerator(enumerator, self._topology, constraints)

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """The sharding plan of ``module``; entries of dynamic tables are :class:`DynamicEmbParameterSharding`.

        Raises:
            ConfigError: constraints that cannot be honoured; see :func:`dynamicemb.planner.tables.dynamic_tables`.
            PlannerError: no plan fits; the message names the dynamic tables and their memory.
        """
        sites = table_sites(module, sharders)
        tables = dynamic_tables(sites, self._constraints, self._topology.world_size)
        check_eb_configs(self._eb_configs, sites)
        for table in tables.values():
            warn_about_what_has_no_effect(table, (self._constraints or {}).get(table.name))
        try:
            plan = super().plan(module, sharders)
        except PlannerError as error:
            if not tables or error.error_type not in _MEMORY_ERRORS:
                raise
            raise PlannerError(
                message=f"{error}\n{_memory_report(tables, self._topology, self._measured_bytes)}",
                error_type=error.error_type,
            ) from error
        return _with_dynamic_tables(plan, tables)

    def collective_plan(
        self,
        module: nn.Module,
        sharders: Optional[list[ModuleSharder[nn.Module]]] = None,
        pg: Optional[dist.ProcessGroup] = None,
    ) -> ShardingPlan:
        """:meth:`plan` on the first rank of ``pg`` (None: the default group); every rank gets the plan or the error.

        Raises:
            ConfigError: see :meth:`plan`; or the topology has another number of ranks than ``pg``. A whole part of
                them is accepted: with 2D parallelism a plan is for the ranks of one replica.
        """
        if pg is None:
            if not dist.is_initialized():
                raise ConfigError("collective_plan needs a process group; use plan() in a single process")
            pg = dist.group.WORLD
        assert pg is not None
        chosen = get_default_sharders() if sharders is None else sharders

        def decide() -> ShardingPlan:
            if dynamic_options(self._constraints):
                _check_ranks(self._topology, pg)
            return self.plan(module, chosen)

        return decide_on_first_rank(pg, decide)


def _check_ranks(topology: Topology, pg: dist.ProcessGroup) -> None:
    if pg.size() % topology.world_size:
        raise ConfigError(
            f"the topology has world_size={topology.world_size}, and the process group has {pg.size()} ranks; a plan "
            f"is carried out on as many ranks as it was made for: use Topology(world_size={pg.size()}, ...), or leave "
            "topology out"
        )


def _checked_eb_configs(eb_configs: Optional[list[BaseEmbeddingConfig]]) -> list[BaseEmbeddingConfig]:
    if isinstance(eb_configs, Topology):
        raise ConfigError("eb_configs is a Topology; eb_configs comes first here, so pass topology=... by name")
    configs = list(eb_configs or ())
    for config in configs:
        if not isinstance(config, BaseEmbeddingConfig):
            raise ConfigError(
                f"eb_configs holds a {type(config).__name__}; it takes the EmbeddingConfigs of the model, or nothing"
            )
    return configs


def _check_device(topology: Optional[Topology], constraints: Optional[Mapping[str, ParameterConstraints]]) -> None:
    if topology is None or topology.compute_device != "cuda" or torch.cuda.is_available():
        return
    tables = ", ".join(f"'{name}'" for name in dynamic_options(constraints))
    raise ConfigError(
        f"the topology's compute_device is 'cuda', and this machine has no GPU that torch can use "
        f"(dynamic tables: {tables or 'none'}); use Topology(world_size=..., compute_device='cpu'), or a machine with "
        "a GPU and a CUDA build of torch"
    )


def _check_enumerator(
    enumerator: Optional[Enumerator],
    topology: Optional[Topology],
    constraints: Optional[Mapping[str, ParameterConstraints]],
) -> None:
    planned = dynamic_options(constraints)
    if enumerator is None:
        return
    if not isinstance(enumerator, DynamicEmbeddingEnumerator):
        if planned:
            raise ConfigError(
                f"enumerator is of type {type(enumerator).__name__}, which cannot place the dynamic tables "
                f"{', '.join(repr(name) for name in planned)}; use DynamicEmbeddingEnumerator, or leave enumerator out"
            )
        return
    enumerated = dynamic_options(enumerator.constraints)
    if planned != enumerated:
        differing = [
            name
            for name in {**planned, **enumerated}
            if name not in planned or name not in enumerated or planned[name] != enumerated[name]
        ]
        raise ConfigError(
            "constraints of the planner and of its enumerator disagree about the dynamic tables "
            f"{', '.join(repr(name) for name in differing)}; pass the same ones to both, or only to the enumerator"
        )
    if topology is None:
        return
    for name in ("world_size", "compute_device"):
        own, other = getattr(topology, name), getattr(enumerator.topology, name)
        if own != other:
            raise ConfigError(
                f"the planner's topology has {name}={own!r}, that of its enumerator {name}={other!r}; use one topology"
            )


def _with_dynamic_tables(plan: ShardingPlan, tables: Mapping[tuple[str, str], DynamicTable]) -> ShardingPlan:
    for (path, name), table in tables.items():
        if name not in plan.plan.get(path, {}):
            raise ConfigError(
                f"table '{table.name}' has use_dynamicemb=True, and torchrec's planner left it out; remove "
                "device_group from its constraints, or let it be the device of the topology"
            )
    for path, module_plan in plan.plan.items():
        assert isinstance(module_plan, EmbeddingModuleShardingPlan)
        for name, sharding in module_plan.items():
            if (path, name) in tables:
                table = tables[path, name]
                module_plan[name] = DynamicEmbParameterSharding.of(sharding, table.options, table.config)
    return plan


def _memory_of_a_rank(topology: Topology) -> Optional[int]:
    """Bytes of this machine's memory for each of its ranks; None where the topology says what there is."""
    told = any(device.storage.ddr != DDR_CAP for device in topology.devices)
    if topology.compute_device != "cpu" or told:
        return None
    return memory_of(torch.device("cpu")).total // topology.local_world_size


def _with_host_memory(topology: Topology, num_bytes: int) -> Topology:
    topology = copy.deepcopy(topology)
    for device in topology.devices:
        device.storage.ddr = num_bytes
    return topology


def _memory_report(
    tables: Mapping[tuple[str, str], DynamicTable], topology: Topology, measured_bytes: Optional[int]
) -> str:
    lines = [
        f"  '{table.name}': {table.total_bytes} bytes on each of {topology.world_size} ranks ({table.slots} rows of "
        f"{table.layout.row_bytes} bytes with optimizer state, and {table.metadata_bytes} bytes of keys and scores)"
        for table in sorted(tables.values(), key=lambda table: -table.total_bytes)
    ]
    total_bytes = sum(table.total_bytes for table in tables.values())
    return "\n".join(
        [
            f"Dynamic tables take {total_bytes} bytes ({format_bytes(total_bytes)}) on each rank, without input and "
            "output buffers:",
            *lines,
            *(
                []
                if measured_bytes is None
                else [
                    f"This machine has {format_bytes(measured_bytes)} for each of its {topology.local_world_size} "
                    "ranks; to plan for another one, give Topology(..., ddr_cap=...)."
                ]
            ),
            "Lower their num_embeddings or dynamicemb_options.max_capacity, use more ranks, or use float16 rows "
            "(dynamicemb_options.embedding_dtype).",
        ]
    )
