"""Batches of ids, drawn on the device: drawing millions of them on the host would take longer than the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from workload import power_law_ranks

__all__ = ["Batch", "IdSource", "count_unique"]


@dataclass(frozen=True)
class Batch:
    """Ids of several tables, all of a table together, tables in ascending order.

    Attributes:
        ids: int64 [N].
        tables: int32 [N].
    """

    ids: torch.Tensor
    tables: torch.Tensor


class IdSource:
    """Ids 0 to ``universe - 1`` of each of several tables; what is popular differs from table to table.

    Args:
        tables: number of them.
        universe: ids of a table.
        device: where batches are made.
        seed: of the popularity and of the draws.
    """

    def __init__(self, tables: int, universe: int, device: torch.device, seed: int = 0) -> None:
        self.tables, self.universe, self.device = tables, universe, device
        self._generator = torch.Generator(device).manual_seed(seed)
        # An odd factor would do as well, but neighbours in popularity should not be neighbours anywhere else.
        self._id_by_rank = [torch.randperm(universe, generator=self._generator, device=device) for _ in range(tables)]

    def power_law(self, ids_per_table: int) -> Batch:
        """The k-th most popular id of a table is drawn about ``k ** -1.05`` times as often as the first."""
        parts = []
        for id_by_rank in self._id_by_rank:
            uniform = torch.rand(ids_per_table, dtype=torch.float64, generator=self._generator, device=self.device)
            ranks = power_law_ranks(uniform, self.universe).long().clamp_(max=self.universe)
            parts.append(id_by_rank[ranks - 1])
        return self._batch(parts)

    def uniform(self, ids_per_table: int) -> Batch:
        """Each id as likely as any other."""
        size = (ids_per_table,)
        return self._batch(
            [
                torch.randint(self.universe, size, generator=self._generator, device=self.device)
                for _ in range(self.tables)
            ]
        )

    def every(self, first: int, count: int) -> Batch:
        """Ids ``first`` to ``first + count - 1`` of every table."""
        return self._batch([torch.arange(first, first + count, device=self.device) for _ in range(self.tables)])

    def _batch(self, parts: list[torch.Tensor]) -> Batch:
        tables = torch.arange(self.tables, dtype=torch.int32, device=self.device)
        return Batch(torch.cat(parts), tables.repeat_interleave(parts[0].numel()))


def count_unique(batch: Batch) -> int:
    """Distinct pairs of table and id. Synchronises."""
    return int((batch.ids + (batch.tables.long() << 40)).unique().numel())
