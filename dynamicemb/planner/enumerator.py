"""TorchRec's enumerator, with one option for each dynamic table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Optional, Union

from torch import nn
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, ShardEstimator, ShardingOption, Topology
from torchrec.distributed.types import ModuleSharder, ShardingPlanner

from dynamicemb.errors import ConfigError
from dynamicemb.planner.constraints import DYNAMIC_KERNEL, DYNAMIC_SHARDING_TYPE, dynamic_options
from dynamicemb.planner.estimators import apply_probe, probe_for
from dynamicemb.planner.tables import DynamicTable, dynamic_tables, table_sites

__all__ = ["DynamicEmbeddingEnumerator"]


class DynamicEmbeddingEnumerator(EmbeddingEnumerator):
    """Sharding options of static tables as TorchRec enumerates them, and of each dynamic table exactly one.

    Args:
        topology: the devices.
        batch_size: samples of a rank's batch; if not given, TorchRec's default, as in its planner.
        constraints: by table name; :class:`~dynamicemb.planner.DynamicEmbParameterConstraints` make tables dynamic.
            Never modified.
        estimator: TorchRec's, one or a list; None: TorchRec's defaults. Dynamic tables are estimated through it too.
        torchrec_options: further keyword arguments of :class:`EmbeddingEnumerator`.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: Optional[int] = None,
        constraints: Optional[dict[str, ParameterConstraints]] = None,
        estimator: Optional[Union[ShardEstimator, list[ShardEstimator]]] = None,
        **torchrec_options: Any,
    ) -> None:
        super().__init__(topology, batch_size or BATCH_SIZE, constraints, estimator, **torchrec_options)
        self._topology = topology
        self._user_constraints = constraints
        self._dynamic_names: frozenset[str] = frozenset()
        self._dynamic_tables: dict[tuple[str, str], DynamicTable] = {}

    @property
    def topology(self) -> Topology:
        return self._topology

    @property
    def constraints(self) -> Optional[dict[str, ParameterConstraints]]:
        """The objects that the user passed in."""
        return self._user_constraints

    @property
    def dynamic_tables(self) -> Mapping[tuple[str, str], DynamicTable]:
        """Dynamic tables of the module last enumerated, by (path of their module, name)."""
        return self._dynamic_tables

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Options of every table that ``sharders`` take, with storage and perf.

        Raises:
            ConfigError: see :func:`dynamicemb.planner.tables.dynamic_tables`; or dynamic tables, and the planner that
                asks is torchrec's.
        """
        self._dynamic_names = frozenset(dynamic_options(self._user_constraints))
        self._refuse_torchrecs_planner(sys._getframe(1).f_locals.get("self"))
        self._dynamic_tables = dynamic_tables(
            table_sites(module, sharders), self._user_constraints, self._topology.world_size
        )
        return super().enumerate(module, sharders)

    def _refuse_torchrecs_planner(self, caller: object) -> None:
        """A planner that does not know dynamic tables would drop their options from the plan."""
        if self._dynamic_names and isinstance(caller, ShardingPlanner) and not hasattr(caller, "plans_dynamic_tables"):
            raise ConfigError(
                f"DynamicEmbeddingEnumerator has the dynamic tables {sorted(self._dynamic_names)}, and its planner is "
                f"of type {type(caller).__name__}; use dynamicemb.planner.DynamicEmbeddingShardingPlanner"
            )

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Fill in storage and perf of every shard of ``sharding_options``."""
        put_to_torchrec = [
            probe_for(option) if option.compute_kernel == DYNAMIC_KERNEL else option for option in sharding_options
        ]
        super().populate_estimates(put_to_torchrec)
        for option, estimated in zip(sharding_options, put_to_torchrec, strict=True):
            if estimated is not option:
                table = self._dynamic_tables[option.path, option.name]
                apply_probe(option, estimated, table, self._topology.compute_device)

    # The two methods below are private in torchrec, and the only place that decides what an enumerator tries.

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], *args: Any) -> list[str]:
        if name in self._dynamic_names:
            return [DYNAMIC_SHARDING_TYPE]
        return super()._filter_sharding_types(name, allowed_sharding_types, *args)

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        if name in self._dynamic_names:
            return [DYNAMIC_KERNEL]
        static_kernels = [kernel for kernel in allowed_compute_kernels if kernel != DYNAMIC_KERNEL]
        return super()._filter_compute_kernels(name, static_kernels, sharding_type)
