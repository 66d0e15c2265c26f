"""The lookup that stands where torchrec's grouped lookups stand, over any number of dynamic tables."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_sharding import BaseEmbeddingLookup
from torchrec.optim.fused import FusedOptimizerModule

from dynamicemb.errors import CapacityError, DynamicEmbWarning, OutOfMemoryError
from dynamicemb.kernels.engine import engine_name
from dynamicemb.options import DynamicEmbCheckMode
from dynamicemb.shard.agreement import raise_on_all_ranks
from dynamicemb.shard.optimizer import DynamicFusedOptimizer
from dynamicemb.shard.parameter import TableParameter
from dynamicemb.shard.route import GroupKeys, OwnedKeys
from dynamicemb.table.config import TableConfig
from dynamicemb.table.function import lookup, requires_grad, without_update
from dynamicemb.table.group import TableGroup
from dynamicemb.table.storage import state_memory

__all__ = ["DynamicLookup", "GroupModule", "group_tables"]


def group_tables(configs: list[TableConfig]) -> list[list[TableConfig]]:
    """Tables that can share a group, together; groups and the tables inside them in the order of first appearance."""
    groups: dict[Any, list[TableConfig]] = {}
    for config in configs:
        groups.setdefault(config.group_key, []).append(config)
    return list(groups.values())


def _by_sender(rows_by_group: list[torch.Tensor], groups: list[GroupKeys]) -> torch.Tensor:
    """The rows in the order in which keys arrived: by sender, and by group from each sender."""
    parts = [
        rows.split([sum(lengths) for lengths in keys.lengths_by_table])
        for rows, keys in zip(rows_by_group, groups, strict=True)
    ]
    return torch.cat([part for of_sender in zip(*parts, strict=True) for part in of_sender])


def _gradient_place(device: torch.device) -> torch.Tensor:
    """What the fused optimizer shows in place of a parameter: with a gradient, of zero, since what goes over the
    gradients of an optimizer (torchrec's clipping does) fails where there is none at all."""
    place = torch.zeros(1, device=device)
    place.grad = torch.zeros(1, device=device)
    return place


class GroupModule(nn.Module, FusedOptimizerModule):
    """A group of tables as a module: its (empty) parameters give torchrec something to name, and autograd an anchor.

    Args:
        group: the tables.
        frozen: names of those whose parameters begin without ``requires_grad``.
    """

    @state_memory()
    def __init__(self, group: TableGroup, frozen: Collection[str] = ()) -> None:
        super().__init__()
        self.group = group
        dim, device = group.storage.layout.dim, group.device
        self._parameters_by_table = {
            config.name: TableParameter(config.name, dim, device, config.name not in frozen) for config in group.configs
        }
        self._optimizer = DynamicFusedOptimizer(
            group, {f"{name}.weight": _gradient_place(device) for name in self._parameters_by_table}
        )
        for parameter in self._parameters_by_table.values():
            parameter._in_backward_optimizers = [self._optimizer]  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        layout, group = self.group.storage.layout, self.group
        tables = ", ".join(
            f"{config.name} ({size.max_slots} rows)"
            for config, size in zip(group.configs, group.storage.geometries, strict=True)
        )
        return (
            f"{tables}; dim={layout.dim}, {layout.embedding_dtype}, {layout.optimizer.name.lower()}, "
            f"{group.evict_strategy.value}, engine={engine_name(group.device)}"
        )

    @property
    def fused_optimizer(self) -> DynamicFusedOptimizer:
        return self._optimizer

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters_by_table.items()

    @property
    def takes_gradients(self) -> bool:
        """Whether any of the tables takes updates."""
        return any(requires_grad(self._weights))

    @property
    def _weights(self) -> list[nn.Parameter]:
        return list(self._parameters_by_table.values())

    def forward(self, keys: GroupKeys) -> torch.Tensor:
        weights = self._weights
        anchor = next(itertools.compress(weights, requires_grad(weights)), weights[0])
        return lookup(
            self.group, anchor, keys.keys, keys.tables, keys.occurrences, self.training, weights,
            keys.lengths_by_table, keys.unique,
        )  # fmt: skip


class DynamicLookup(BaseEmbeddingLookup[OwnedKeys, torch.Tensor]):
    """Rows of the keys that this rank owns.

    Args:
        groups: the tables, grouped, in the order in which the input distribution numbers them.
        pg: ranks that share the tables; None for a single process without one.
        device: where the tables live.
        output_dtype: of the rows that leave the lookup.
        frozen: names of tables that take no updates until ``requires_grad`` of their parameters is set.
    """

    def __init__(
        self,
        groups: list[list[TableConfig]],
        pg: Optional[dist.ProcessGroup],
        device: torch.device,
        output_dtype: torch.dtype,
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.process_group = pg
        self._output_dtype = output_dtype
        world_size = 1 if pg is None else pg.size()
        modules, no_room = [], None
        try:
            modules = [GroupModule(TableGroup(configs, world_size, device), frozen) for configs in groups]
        except OutOfMemoryError as caught:
            no_room = caught
        raise_on_all_ranks(no_room, pg, "make its tables")
        self.group_modules = nn.ModuleList(modules)
        self._checked = any(
            config.safe_check_mode is not DynamicEmbCheckMode.IGNORE for configs in groups for config in configs
        )

    @property
    def groups(self) -> list[TableGroup]:
        return [module.group for module in self.group_modules]  # type: ignore[misc]

    def forward(self, sparse_features: OwnedKeys) -> torch.Tensor:
        """Looks the keys up; in training, inserts those that are absent.

        Args:
            sparse_features: keys that this rank owns.

        Returns:
            [N, dim] in ``output_dtype``, in the order of the keys. They require a gradient if a table takes updates (on
            any rank, since ranks exchange gradients together), in evaluation too, where a gradient changes nothing.

        Raises:
            CapacityError: keys were refused, on any rank, in a table whose safe_check_mode is ERROR.
        """
        before = self._refused() if self._checked and self.training else None
        groups = sparse_features.groups
        rows_by_group = [module(keys) for module, keys in zip(self.group_modules, groups, strict=True)]
        rows = rows_by_group[0] if len(groups) == 1 else _by_sender(rows_by_group, groups)
        if before is not None:
            self._check_refused(self._refused() - before)
        return self._in_graph(rows, sparse_features).to(self._output_dtype)

    def takes_gradients(self) -> bool:
        """Whether any table takes updates on this rank."""
        return any(module.takes_gradients for module in self.group_modules)

    def trains(self) -> bool:
        """Whether lookups insert ids now, and note what they touch."""
        return self.training

    def _in_graph(self, rows: torch.Tensor, owned: OwnedKeys) -> torch.Tensor:
        """``rows``, part of a graph where they should be."""
        if not torch.is_grad_enabled():
            return rows
        wanted = self.takes_gradients() if owned.takes_gradients is None else owned.takes_gradients
        if rows.requires_grad == wanted:
            return rows
        # Where tables have been frozen or set free since the ranks agreed, this batch goes by what they agreed on.
        return without_update(rows) if wanted else rows.detach()

    # ------------------------------------------------------------------------------------------ refused keys

    def _refused(self) -> torch.Tensor:
        return torch.cat([group.refused() for group in self.groups])

    def _check_refused(self, refused: torch.Tensor) -> None:
        """Adds up over all ranks what this step refused, and raises or warns on each of them alike."""
        if self.process_group is not None and self.process_group.size() > 1:
            dist.all_reduce(refused, group=self.process_group)
        configs = [config for group in self.groups for config in group.configs]
        messages: dict[DynamicEmbCheckMode, list[str]] = {}
        for config, count in zip(configs, refused.tolist(), strict=True):
            if count:
                messages.setdefault(config.safe_check_mode, []).append(
                    f"table '{config.name}' refused {count} keys of this batch"
                )
        remedy = "; every slot of their buckets belongs to this batch: raise the capacity, or use smaller batches"
        if warning := messages.get(DynamicEmbCheckMode.WARNING):
            warnings.warn(", ".join(warning) + remedy, DynamicEmbWarning, stacklevel=2)
        if error := messages.get(DynamicEmbCheckMode.ERROR):
            raise CapacityError(", ".join(error) + remedy)

    # ------------------------------------------------------------------------------------------ what torchrec asks

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(table, its empty parameter); the rows themselves are not parameters."""
        for module in self.group_modules:
            yield from module.named_parameters_by_table()  # type: ignore[operator]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: rows are no parameters. The collection shows them; see :mod:`dynamicemb.shard.state_dict`."""
        return OrderedDict()

    def flush(self) -> None:
        """Nothing is cached."""

    def purge(self) -> None:
        """Nothing is cached."""

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prefetch: rows live on the device."""
