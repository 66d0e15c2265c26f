"""Dynamic tables in ``model.load_state_dict()``: everything is checked, on every rank, before any table changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dynamicemb.errors import CheckpointError, DynamicEmbWarning, RemoteRankError
from dynamicemb.kernels.hashing import mix64, owners, sortable
from dynamicemb.kernels.update import HyperparameterColumn
from dynamicemb.shard.lookup import DynamicLookup
from dynamicemb.shard.state_dict import (
    HYPERPARAMETERS_ENTRY,
    KEYS,
    PROGRESS,
    PROGRESS_ENTRY,
    SCORES,
    SLOTS,
    WEIGHT,
    TableSlot,
    row_entries,
    state_entry,
    table_slots,
)
from dynamicemb.table.filling import HostRows, TableFilling
from dynamicemb.table.group import TableProgress
from dynamicemb.table.optimizers import HYPERPARAMETERS

__all__ = ["restore_tables"]

#: Rows that are put into a table at a time.
_PIECE_ROWS = 1 << 16
_REMEDY = (
    "each rank must have its own rows; dynamicemb.checkpoint.dcp.load reads a checkpoint so, at any number of ranks"
)


@dataclass(frozen=True)
class _CheckedTable:
    """The state of one table, found good.

    Attributes:
        rows: by entry, this rank's.
        total_rows: of all ranks, as the state dict says.
        progress, hyperparameters, slots: as lists.
    """

    table: TableSlot
    rows: dict[str, torch.Tensor]
    total_rows: int
    progress: list[int]
    hyperparameters: list[float]
    slots: list[int]


def restore_tables(lookup: DynamicLookup, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces the contents of tables by what a state dict has. All ranks that share them call it together.

    Args:
        lookup: of the tables.
        states: all entries of each table that is to be restored, by the table's name and the entry's: tensors of all
            rows, the same on every rank, or ``ShardedTensor``\\ s of which each rank has the rows that it owns.

    Raises:
        CheckpointError: an entry is not what it should be, or its rows are not this rank's. No table has changed.
        RemoteRankError: that happened on another rank.
    """
    pg = lookup.process_group
    checked: list[_CheckedTable] = []
    error: Optional[Exception] = None
    try:
        checked = [_checked(table, states[table.name], pg) for table in table_slots(lookup) if table.name in states]
    except Exception as failure:  # whatever it is, other ranks must not wait for this one
        error = failure
    _agree(checked, error, pg)
    for entry in checked:
        _replace(entry, pg)


# ---------------------------------------------------------------------------------------------------- checks


def _checked(table: TableSlot, state: Mapping[str, Any], pg: Optional[dist.ProcessGroup]) -> _CheckedTable:
    rows, ranges = {}, {}
    for entry in row_entries(table.layout):
        where = f"state dict of table '{table.name}', entry '{entry.name}'"
        rows[entry.name], ranges[entry.name] = _local_rows(where, state[entry.name])
        shape = (*ranges[entry.name].size[1:],)
        if rows[entry.name].dtype != entry.dtype or shape != entry.row_shape:
            raise CheckpointError(
                f"{where}: rows of shape {list(shape)} and {rows[entry.name].dtype}; the model's table has "
                f"{list(entry.row_shape)} and {entry.dtype}: give it the dim, dtype and optimizer that were saved"
            )
        if ranges[entry.name].places != ranges[KEYS].places or ranges[entry.name].size[0] != ranges[KEYS].size[0]:
            raise CheckpointError(f"{where}: other rows than those of 'keys'; all entries must be of one state dict")
    first, stop = _own_range(table.name, rows[KEYS], ranges[KEYS], pg)
    return _CheckedTable(
        table,
        {name: values[first:stop] for name, values in rows.items()},
        ranges[KEYS].size[0],
        *_checked_numbers(table.name, state),
    )


@dataclass(frozen=True)
class _Ranges:
    """Which rows of a tensor of shape ``size`` are here: (first, rows) of each shard; None: all of them."""

    size: torch.Size
    places: Optional[list[tuple[int, int]]]


def _local_rows(where: str, value: Any) -> tuple[torch.Tensor, _Ranges]:
    """The rows that are here, [n, ...] in host memory, in ascending order of their place."""
    if isinstance(value, ShardedTensor):
        size, dtype = value.metadata().size, value.metadata().tensor_properties.dtype
        shards = sorted(value.local_shards(), key=lambda shard: shard.metadata.shard_offsets)
        places = [(shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]) for shard in shards]
        if any(list(shard.metadata.shard_sizes[1:]) != list(size[1:]) for shard in shards):
            raise CheckpointError(f"{where}: its columns are divided among shards; a shard must have whole rows")
        pieces = [shard.tensor.detach().cpu() for shard in shards]
        empty = torch.empty(0, *size[1:], dtype=dtype)
        return (pieces[0] if len(pieces) == 1 else torch.cat([empty, *pieces])), _Ranges(size, places)
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dim() > 0:
        return value.detach().cpu(), _Ranges(value.shape, None)
    shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
    raise CheckpointError(f"{where}: {type(value).__name__} {shown}, expected rows as a tensor or a ShardedTensor")


def _own_range(table: str, keys: torch.Tensor, ranges: _Ranges, pg: Optional[dist.ProcessGroup]) -> tuple[int, int]:
    """Where this rank's rows are among those that are here, after a look at the order of all of these."""
    where = f"state dict of table '{table}', entry 'keys'"
    mixed = sortable(mix64(keys))
    if (wrong := (mixed[1:] <= mixed[:-1]).nonzero()).numel():
        place = int(wrong[0])
        one, other = keys[place : place + 2].tolist()
        what = "twice" if one == other else f"before key {other}, which precedes it in the order of mixed keys"
        raise CheckpointError(f"{where}: row {place} of this rank has key {one} {what}; each key must be there once")
    rank, size = (0, 1) if pg is None else (pg.rank(), pg.size())
    owner = owners(keys, size)
    if ranges.places is None:
        first, stop = torch.searchsorted(owner, torch.tensor([rank, rank + 1])).tolist()
        return first, stop
    if (foreign := (owner != rank).nonzero()).numel():
        place = int(foreign[0])
        raise CheckpointError(
            f"{where}: key {int(keys[place])} belongs to rank {int(owner[place])} of {size}, but is on rank {rank}: "
            f"{_REMEDY}"
        )
    return 0, keys.numel()


def _checked_numbers(table: str, state: Mapping[str, Any]) -> tuple[list[int], list[float], list[int]]:
    expected = {
        PROGRESS_ENTRY: (torch.int64, len(PROGRESS)),
        HYPERPARAMETERS_ENTRY: (torch.float64, len(HYPERPARAMETERS)),
        SLOTS: (torch.int64, None),
    }
    numbers: dict[str, Any] = {}
    for name, (dtype, length) in expected.items():
        value = state[name]
        if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() != 1 or not len(value):
            shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
            raise CheckpointError(f"state dict of table '{table}', entry '{name}': {shown}, expected {dtype} [n]")
        if length is not None and len(value) != length:
            raise CheckpointError(
                f"state dict of table '{table}', entry '{name}': {len(value)} numbers, expected {length}"
            )
        numbers[name] = value.tolist()
    by_name = dict(zip(PROGRESS, numbers[PROGRESS_ENTRY], strict=True))
    negative = [name for name, number in by_name.items() if number < 0 and name != "custom_score"]
    if negative or min(numbers[SLOTS]) < 0 or not all(map(math.isfinite, numbers[HYPERPARAMETERS_ENTRY])):
        raise CheckpointError(
            f"state dict of table '{table}': numbers that no training gives: {by_name}, slots {numbers[SLOTS]}, "
            f"hyperparameters {numbers[HYPERPARAMETERS_ENTRY]}; the state dict is damaged"
        )
    return numbers[PROGRESS_ENTRY], numbers[HYPERPARAMETERS_ENTRY], numbers[SLOTS]


def _agree(checked: list[_CheckedTable], error: Optional[Exception], pg: Optional[dist.ProcessGroup]) -> None:
    """Raises on every rank what any rank has found, and what only all of them together can find."""
    own = {
        entry.table.name: (
            entry.rows[KEYS].numel(), (entry.total_rows, entry.progress, entry.hyperparameters, entry.slots)
        )
        for entry in checked
    }  # fmt: skip
    outcomes: list[Any] = [(own, None if error is None else str(error))]
    if pg is not None and pg.size() > 1:
        outcomes = [None] * pg.size()
        dist.all_gather_object(outcomes, (own, None if error is None else str(error)), group=pg)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RemoteRankError(f"rank {rank} cannot load its state dict: {message}")
    for rank, (tables, _) in enumerate(outcomes):
        if {name: facts for name, (_, facts) in tables.items()} != {name: facts for name, (_, facts) in own.items()}:
            raise CheckpointError(
                f"the state dicts of the ranks are different ones: rank {rank} has tables {sorted(tables)}, this rank "
                f"{sorted(own)}, or numbers of rows or steps differ; every rank must load the same checkpoint"
            )
    for name, (_, (total_rows, *_)) in own.items():
        rows = sum(tables[name][0] for tables, _ in outcomes)
        if rows != total_rows:
            raise CheckpointError(
                f"state dict of table '{name}': {total_rows} rows, of which the ranks have {rows}: {_REMEDY}"
            )


# ---------------------------------------------------------------------------------------------------- change


def _replace(entry: _CheckedTable, pg: Optional[dist.ProcessGroup]) -> None:
    table, rank = entry.table, 0 if pg is None else pg.rank()
    size = 1 if pg is None else pg.size()
    rows = HostRows(
        keys=entry.rows[KEYS],
        scores=entry.rows[SCORES],
        embeddings=entry.rows[WEIGHT],
        states={state.name: entry.rows[state_entry(state.name)] for state in table.layout.states},
    )
    slots = entry.slots[rank] if len(entry.slots) == size else None
    filling = TableFilling(table.group, table.index, len(rows), slots)
    for start in range(0, len(rows), _PIECE_ROWS):
        filling.add(rows[start : start + _PIECE_ROWS])
    filling.finish()
    numbers = dict(zip(PROGRESS, entry.progress, strict=True))
    if rank != 0:  # one rank has the events of all of them, so that their sums are right
        numbers |= dict.fromkeys(("hits", "evicted", "refused"), 0)
    progress = TableProgress(**numbers, hyperparameters=tuple(entry.hyperparameters))
    table.group.restore(table.index, progress, filling.kept)
    table.module.fused_optimizer.restore_learning_rate(
        table.index, entry.hyperparameters[HyperparameterColumn.LEARNING_RATE]
    )
    if filling.left_out:
        warnings.warn(
            f"table '{table.name}': {filling.left_out} of {len(rows)} rows of rank {rank} found no place, those with "
            f"the lowest scores; its capacity is {table.group.storage.geometries[table.index].max_slots}",
            DynamicEmbWarning,
            stacklevel=2,
        )
