"""Filling a table from rows that come in the order of the mixed key: from a checkpoint, from a state dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from dynamicemb.errors import OutOfMemoryError
from dynamicemb.kernels.hashing import buckets
from dynamicemb.table.group import TableGroup

__all__ = ["HostRows", "TableFilling"]


@dataclass(frozen=True)
class HostRows:
    """Rows in host memory, in ascending order of the mixed key.

    Attributes:
        keys: int64 [n].
        scores: int64 [n].
        embeddings: [n, dim] in the table's dtype.
        states: float32 [n, width] by name; empty where optimizer state is to begin anew.
    """

    keys: torch.Tensor
    scores: torch.Tensor
    embeddings: torch.Tensor
    states: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return self.keys.numel()

    def __getitem__(self, rows: slice | torch.Tensor) -> HostRows:
        states = {name: state[rows] for name, state in self.states.items()}
        return HostRows(self.keys[rows], self.scores[rows], self.embeddings[rows], states)

    def followed_by(self, others: HostRows) -> HostRows:
        states = {name: torch.cat([state, others.states[name]]) for name, state in self.states.items()}
        return HostRows(
            torch.cat([self.keys, others.keys]),
            torch.cat([self.scores, others.scores]),
            torch.cat([self.embeddings, others.embeddings]),
            states,
        )


class TableFilling:
    """Replaces the contents of one table by rows that arrive in pieces, each key once, all owned by this rank.

    Making one empties the table. Where more rows belong to a bucket than it has slots, a table that may grow does;
    one that may not keeps those with the highest (score, key), as eviction would have.

    Args:
        group, table: the table.
        rows: how many will come; decides about the size that the table starts with.
        slots: the size that the table had when the rows were saved, if it is one that this table can have.

    Raises:
        OutOfMemoryError: no room for the rows, here or in :meth:`add`. The table is empty, or has a part of them.
    """

    def __init__(self, group: TableGroup, table: int, rows: int, slots: Optional[int] = None) -> None:
        self._group, self._table = group, table
        self._contents = group.contents(table)
        config = group.configs[table]
        geometry = config.geometry()
        saved = None if slots is None else geometry.with_slots(slots)
        if saved is None or saved.slots < geometry.slots:
            saved = geometry.sized_for(rows, config.max_load_factor)
        self._initial_state = config.optimizer.initial_state
        try:
            self._contents.clear(saved)
        except OutOfMemoryError:  # the table is empty
            group.restore(table, group.progress(table), 0)
            raise
        # Rows of the last bucket seen, of which more may come.
        self._open: Optional[HostRows] = None
        #: Rows that found a place, and those that did not.
        self.kept = self.left_out = 0

    def add(self, rows: HostRows) -> None:
        """The rows that follow those added before."""
        if len(rows) == 0:
            return
        if self._open is not None:
            rows = self._open.followed_by(rows)
        rows, bucket = self._fitting(rows)
        last = int(torch.searchsorted(bucket, bucket[-1:])[0])
        self._insert(rows[:last])
        self._open = rows[last:]

    def finish(self) -> None:
        """All rows have been added."""
        if self._open is not None:
            self._insert(self._open)
            self._open = None

    def _fitting(self, rows: HostRows) -> tuple[HostRows, torch.Tensor]:
        """``rows`` without those that have no place, and the bucket of each, int64 [n]."""
        storage, world_size = self._group.storage, self._group.world_size
        while True:
            geometry = storage.geometries[self._table]
            bucket = buckets(rows.keys, world_size, geometry.max_buckets, geometry.shift)
            _, sizes = torch.unique_consecutive(bucket, return_counts=True)
            if int(sizes.max()) <= geometry.bucket_capacity:
                return rows, bucket
            if not geometry.can_grow:
                break
            storage.double(self._table)
        kept = _highest(rows, bucket, sizes, geometry.bucket_capacity)
        self.left_out += len(rows) - kept.numel()
        return rows[kept], bucket[kept]

    def _insert(self, rows: HostRows) -> None:
        if len(rows) == 0:
            return
        device, layout = self._group.device, self._group.storage.layout
        states = {name: state.to(device) for name, state in rows.states.items()}
        for state in layout.states:
            if state.name not in states:
                states[state.name] = torch.full((len(rows), state.width), self._initial_state, device=device)
        embeddings = rows.embeddings.to(device)
        self._contents.insert(rows.keys.to(device), rows.scores.to(device), embeddings, states)
        self.kept += len(rows)


def _highest(rows: HostRows, bucket: torch.Tensor, sizes: torch.Tensor, capacity: int) -> torch.Tensor:
    """Positions, ascending, of the ``capacity`` rows with the highest (score, key) of each bucket."""
    order = np.lexsort((rows.keys.numpy(), rows.scores.numpy(), bucket.numpy()))
    ends = torch.repeat_interleave(sizes.cumsum(0), sizes)
    kept = torch.from_numpy(order)[torch.arange(len(rows)) >= ends - capacity]
    return kept.sort().values
