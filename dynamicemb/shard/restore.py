"""Dynamic tables in ``model.load_state_dict()``: everything is checked, on every rank, before any table changes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.distributed as dist

from dynamicemb.errors import CheckpointError, DynamicEmbWarning, OutOfMemoryError, RemoteRankError
from dynamicemb.kernels.update import HyperparameterColumn
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.shard.agreement import raise_on_all_ranks
from dynamicemb.shard.checked_state import REMEDY, CheckedTable, checked_table
from dynamicemb.shard.lookup import DynamicLookup
from dynamicemb.shard.state_dict import (
    CONFIG_ENTRY,
    KEYS,
    OPTIMIZER_PREFIX,
    PROGRESS,
    SCORES,
    WEIGHT,
    dynamic_into_static,
    entry_names,
    is_dynamic,
    state_entry,
    table_slots,
)
from dynamicemb.table.filling import HostRows, TableFilling
from dynamicemb.table.group import TableProgress

__all__ = ["TakenEntries", "exchanged_table", "restore_tables", "take_entries"]

#: Rows that are put into a table at a time.
_PIECE_ROWS = 1 << 16


@dataclass
class TakenEntries:
    """What a state dict has of dynamic tables.

    Attributes:
        states: entries by table, of each that has some.
        static: tables that have the weight of a static one instead.
        missing: names in the state dict that are missing; torch itself notices missing weights.
        complete: nothing is missing.
    """

    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    static: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    complete: bool = True


def take_entries(
    lookup: DynamicLookup, state_dict: dict[str, Any], start: str, parameters: Mapping[str, torch.Tensor]
) -> TakenEntries:
    """Takes the entries of dynamic tables out of a state dict, and puts what torch expects in the place of weights.

    Args:
        lookup: of the tables.
        state_dict: changed in place.
        start: what names begin with, before that of a table.
        parameters: of each table.
    """
    taken = TakenEntries()
    for table in table_slots(lookup):
        own = f"{start}{table.name}."
        names = entry_names(table.layout)
        found = {name: state_dict.pop(own + name) for name in names if own + name in state_dict}
        if WEIGHT in found:
            state_dict[own + WEIGHT] = parameters[table.name]
        optional = (WEIGHT, CONFIG_ENTRY) if KEYS in found else (WEIGHT,)  # earlier state dicts have no config
        taken.missing.extend(own + name for name in names if name not in found and name not in optional)
        taken.complete &= WEIGHT in found and not taken.missing
        if list(found) == [WEIGHT]:
            taken.static.append(table.name)
        elif found:
            # States of another optimizer stay, so that torch calls them unexpected.
            others = [name for name in state_dict if name.startswith(own + OPTIMIZER_PREFIX)]
            taken.states[table.name] = found | {name.removeprefix(own): state_dict[name] for name in others}
    return taken


def exchanged_table(state_dict: Mapping[str, Any], start: str, static_tables: Sequence[str]) -> Optional[Exception]:
    """An error if a state dict has rows of a dynamic table for a static one."""
    for table in static_tables:
        if is_dynamic(state_dict, f"{start}{table}."):
            return CheckpointError(dynamic_into_static(f"state dict of table '{table}'"))
    return None


def restore_tables(
    lookup: DynamicLookup, taken: TakenEntries, error: Optional[Exception] = None, change: bool = True
) -> None:
    """Replaces the contents of tables by what a state dict has. All ranks that share them call it together.

    Args:
        lookup: of the tables.
        taken: what the state dict has: of each entry, a tensor of all rows, the same on every rank, or a
            ``ShardedTensor`` of which each rank has the rows that it owns. Keys and rows must be there; whatever else
            is missing starts fresh, which a :class:`~dynamicemb.errors.DynamicEmbWarning` says: scores are 0; optimizer
            state, all of it with the count of updates, is that of new rows; counts of events are 0, and the table's
            own clock goes on, under LRU at that of its latest row at least; hyperparameters are the model's own.
        error: found in the state dict already; raised on all ranks.
        change: False only checks, and passes over tables of which keys or rows are missing.

    Raises:
        CheckpointError: an entry is not what it should be, the rows cannot be rows of the table, or are not this
            rank's. No table has changed.
        OutOfMemoryError: no room for the rows; the table that it names is empty.
        RemoteRankError: that happened on another rank.
    """
    pg = lookup.process_group
    checked: list[CheckedTable] = []
    try:
        states = {name: state for name, state in taken.states.items() if change or {KEYS, WEIGHT} <= state.keys()}
        tables = [table for table in table_slots(lookup) if table.name in states] if error is None else []
        checked = [checked_table(table, states[table.name], pg) for table in tables]
    except Exception as failure:  # whatever it is, other ranks must not wait for this one
        error = failure
    top_scores = _agree(checked, error, pg)
    if not change:
        return
    no_room = None
    try:
        for entry in checked:
            _replace(entry, top_scores[entry.table.name], pg)
    except OutOfMemoryError as caught:
        no_room = caught
    raise_on_all_ranks(no_room, pg, "load its state dict")
    _warn_about_what_is_missing(checked)


def _warn_about_what_is_missing(checked: list[CheckedTable]) -> None:
    if partial := [entry for entry in checked if entry.fresh]:
        tables = "; ".join(f"table '{entry.table.name}': {', '.join(entry.fresh)}" for entry in partial)
        warnings.warn(
            f"the state dict has rows of dynamic tables without all that belongs to them, which starts fresh: {tables}",
            DynamicEmbWarning,
            stacklevel=3,
        )
    if unknown := [entry.table.name for entry in checked if not entry.says_config]:
        warnings.warn(
            f"the state dict does not say which eviction strategy and optimizer the tables {', '.join(unknown)} had "
            "when it was saved, by an earlier version; they are taken to be the model's: if they were others, rows are "
            "evicted in the wrong order from now on",
            DynamicEmbWarning,
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------------------------- all ranks


def _agree(checked: list[CheckedTable], error: Optional[Exception], pg: Optional[dist.ProcessGroup]) -> dict[str, int]:
    """Raises on every rank what any rank has found, and what only all of them together can find.

    Returns:
        The highest score of each table, over all ranks; 0 if it has none.
    """
    own = {entry.table.name: (entry.facts, entry.rows[KEYS].numel(), _top_score(entry)) for entry in checked}
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
        if {name: facts for name, (facts, *_) in tables.items()} != {name: facts for name, (facts, *_) in own.items()}:
            raise CheckpointError(
                f"the state dicts of the ranks are different ones: rank {rank} has tables {sorted(tables)}, this rank "
                f"{sorted(own)}, or entries, numbers of rows or steps differ; every rank must load the same checkpoint"
            )
    for entry in checked:
        rows = sum(tables[entry.table.name][1] for tables, _ in outcomes)
        if rows != entry.total_rows:
            raise CheckpointError(
                f"state dict of table '{entry.table.name}': {entry.total_rows} rows, of which the ranks have {rows}: "
                f"{REMEDY}"
            )
    return {name: max(tables[name][2] for tables, _ in outcomes) for name in own}


def _top_score(entry: CheckedTable) -> int:
    scores = entry.rows.get(SCORES)
    return int(scores.max()) if scores is not None and scores.numel() else 0


# ---------------------------------------------------------------------------------------------------- change


def _replace(entry: CheckedTable, top_score: int, pg: Optional[dist.ProcessGroup]) -> None:
    table, rank = entry.table, 0 if pg is None else pg.rank()
    size = 1 if pg is None else pg.size()
    keys = entry.rows[KEYS]
    rows = HostRows(
        keys=keys,
        scores=entry.rows.get(SCORES, torch.zeros_like(keys)),
        embeddings=entry.rows[WEIGHT],
        states={state.name: entry.rows[state_entry(state.name)] for state in table.layout.states}
        if entry.has_optimizer
        else {},
    )
    slots = entry.slots[rank] if entry.slots is not None and len(entry.slots) == size else None
    progress = _progress(entry, top_score, rank)
    filling = TableFilling(table.group, table.index, len(rows), slots)
    for start in range(0, len(rows), _PIECE_ROWS):
        filling.add(rows[start : start + _PIECE_ROWS])
    filling.finish()
    table.group.restore(table.index, progress, filling.kept)
    table.module.fused_optimizer.restore_learning_rate(
        table.index, progress.hyperparameters[HyperparameterColumn.LEARNING_RATE]
    )
    if filling.left_out:
        warnings.warn(
            f"table '{table.name}': {filling.left_out} of {len(rows)} rows of rank {rank} found no place, those with "
            f"the lowest scores; its capacity is {table.group.storage.geometries[table.index].max_slots}",
            DynamicEmbWarning,
            stacklevel=2,
        )


def _progress(entry: CheckedTable, top_score: int, rank: int) -> TableProgress:
    """How far training has come: as the state dict says, or from here on."""
    group, index = entry.table.group, entry.table.index
    now = group.progress(index)
    if entry.progress is not None:
        numbers = dict(zip(PROGRESS, entry.progress, strict=True))
        progress = TableProgress(**numbers, hyperparameters=now.hyperparameters)
    else:
        # Under LRU a score is a time: rows from the future would never be evicted.
        lru = group.evict_strategy is DynamicEmbEvictStrategy.LRU
        clock = max(now.clock, top_score) if lru else now.clock
        progress = dataclasses.replace(now, clock=clock, steps=0, hits=0, evicted=0, refused=0)
    if not entry.has_optimizer:
        progress = dataclasses.replace(progress, steps=0)
    if entry.hyperparameters is not None:
        progress = dataclasses.replace(progress, hyperparameters=tuple(entry.hyperparameters))
    if rank != 0:  # one rank has the events of all of them, so that their sums are right
        progress = dataclasses.replace(progress, hits=0, evicted=0, refused=0)
    return progress
