"""Groups of dynamic tables that hold every id of a source."""

from __future__ import annotations

import itertools

import torch
from workload import INITIAL_BOUND

from dynamicemb import DynamicEmbInitializerArgs
from dynamicemb.kernels.fill import fill_missing
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, table_bytes
from dynamicemb.kernels.views import KeyBatch
from dynamicemb.table.config import TableConfig
from dynamicemb.table.function import lookup
from dynamicemb.table.group import TableGroup
from dynamicemb.table.initializers import initializer_view
from dynamicemb.table.optimizers import OptimizerConfig
from gpu.ids import Batch, IdSource

__all__ = [
    "BUCKET_CAPACITY",
    "INITIALIZER",
    "LOAD",
    "DynamicTables",
    "capacity_for",
    "dynamic_bytes",
    "slices",
]

BUCKET_CAPACITY = 128
#: Share of the slots that the ids of a table fill; no bucket of 128 overflows then.
LOAD = 0.6
INITIALIZER = DynamicEmbInitializerArgs(lower=-INITIAL_BOUND, upper=INITIAL_BOUND)


def capacity_for(rows: int) -> int:
    """Slots of a table of which ``rows`` rows fill :data:`LOAD`."""
    return max(int(rows / LOAD), 1024)


def dynamic_bytes(tables: int, rows: int, dim: int, kind: OptimizerKind) -> int:
    """Memory of such a group."""
    return tables * table_bytes(capacity_for(rows), BUCKET_CAPACITY, RowLayout(dim, torch.float32, kind))


class DynamicTables:
    """Tables with the same layout in one group that cannot grow, so that nothing asks the device for a size.

    Args:
        tables: number of them.
        rows: that each will hold.
        dim: columns.
        optimizer: of all of them.
        device: where they live.
    """

    def __init__(self, tables: int, rows: int, dim: int, optimizer: OptimizerConfig, device: torch.device) -> None:
        capacity = capacity_for(rows)
        configs = [
            TableConfig(
                name=f"t{index}",
                dim=dim,
                max_capacity=capacity,
                init_capacity=capacity,
                bucket_capacity=BUCKET_CAPACITY,
                initializer=INITIALIZER,
                optimizer=optimizer,
            )
            for index in range(tables)
        ]
        self.rows, self.dim = rows, dim
        self.group = TableGroup(configs, world_size=1, device=device)
        names, seeds = [config.name for config in configs], [config.seed for config in configs]
        self._initializer = initializer_view(names, seeds, [INITIALIZER] * tables, [0.0] * tables, device)
        self._anchor = torch.nn.Parameter(torch.empty(0, dim, device=device))

    @property
    def layout(self) -> RowLayout:
        return self.group.storage.layout

    @property
    def buckets(self) -> int:
        """Of all tables together."""
        return sum(geometry.buckets for geometry in self.group.storage.geometries)

    @property
    def num_bytes(self) -> int:
        return self.group.storage.num_bytes

    def train(self, batch: Batch) -> torch.Tensor:
        """Rows, whose gradient updates the tables."""
        return lookup(self.group, self._anchor, batch.ids, batch.tables, None, training=True)

    def read(self, batch: Batch) -> torch.Tensor:
        """Rows, changing nothing; an absent id reads as zeros."""
        return lookup(self.group, self._anchor, batch.ids, batch.tables, None, training=False)

    def read_with_initializer(self, batch: Batch) -> torch.Tensor:
        """What :meth:`read` does in a group with an evaluation initializer: an absent id reads as its first row. One
        group can be configured for one of both, and a second one would need as much memory again."""
        view = self.group.storage.view
        slots = find(view, KeyBatch(batch.ids, batch.tables))
        rows = gather(view, slots)
        fill_missing(rows, batch.ids, batch.tables, slots, self._initializer, self.layout.embedding_dtype)
        return rows

    def insert_every(self, source: IdSource, ids_per_step: int) -> None:
        """Inserts all ids of ``source``, about ``ids_per_step`` in each step."""
        for first, count in slices(source.universe, max(1, ids_per_step // source.tables)):
            batch = source.every(first, count)
            self.group.train_lookup(batch.ids, batch.tables)

    def misplaced(self) -> int:
        """Keys that were evicted or refused so far. Synchronises."""
        return sum(counters.evicted + counters.refused for counters in self.group.counters())


def slices(total: int, size: int) -> list[tuple[int, int]]:
    """(first, count) of neighbouring ranges of at most ``size`` that cover ``total``."""
    bounds = [*range(0, total, size), total]
    return [(first, last - first) for first, last in itertools.pairwise(bounds)]
