"""From the tables of a model to a delta: what has changed since an earlier checkpoint, at the cost of what has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np
import torch.distributed as dist
from torch import nn

from dynamicemb.checkpoint.dump import Extract, write_checkpoint
from dynamicemb.checkpoint.files.lineage import History, adopted, described, is_in
from dynamicemb.checkpoint.files.manifest import Manifest, read_manifest
from dynamicemb.checkpoint.files.paths import PathLike, local_path
from dynamicemb.checkpoint.files.staging import Staging, finished
from dynamicemb.checkpoint.selection import (
    Collections,
    TableNames,
    check_collections,
    chosen,
    not_stored,
    stored_name,
)
from dynamicemb.errors import CheckpointError, ConfigError
from dynamicemb.shard.tables import DynamicTable

__all__ = ["incremental_dump"]

#: The step that each table's delta begins at, and what the table has been through, by collection and name.
_Starts = Mapping[tuple[str, str], tuple[int, History]]


def incremental_dump(
    path: PathLike,
    model: nn.Module,
    since: Union[int, PathLike],
    table_names: TableNames = None,
    optim: Optional[bool] = False,
    pg: Optional[dist.ProcessGroup] = None,
    *,
    overwrite: bool = False,
    collections: Optional[Collections] = None,
) -> None:
    """Writes what has changed in the dynamic tables of ``model`` since an earlier checkpoint: rows that were touched,
    and the keys that were evicted and are not there now. Called by all ranks together, between two steps.

    A full checkpoint and the deltas after it, in order, are what a full dump at the time of the last delta would have
    been, bit for bit: :func:`~dynamicemb.checkpoint.load.DynamicEmbLoad` takes them as a list of paths, and
    :func:`~dynamicemb.checkpoint.merge.merge` makes one full checkpoint of them. Deltas may overlap: each may begin at
    the full checkpoint or at any delta before it. A delta appears at ``path`` at once, as a dump does.

    Only rows that were touched are read and written, and the keys that have gone. Of the other slots metadata is looked
    at on the device where it is, twice: 26 bytes of each slot in all with the strategy LRU, 18 with the others.

    A model notes its changes from its first dump or load on; before, training costs nothing. Then every lookup notes
    which keys it evicted, at most 8,388,608 of a group of tables on a rank (at least 65,536, else a quarter of its
    slots; 16 bytes each), and, unless the strategy is LRU, when slots were touched (4 bytes for each slot). A captured
    CUDA graph of a step notes changes if it was captured after that, with an eager step in between.

    Args:
        path: folder of the delta, the same on every rank, on a file system that all of them see.
        model: the sharded model, wrapped or not.
        since: the earlier checkpoint, full or delta; or its step, the number of training lookups of the tables then. 0
            is before the first of them: every row is written.
        table_names: tables by path of their collection, the model itself being called ``model``; None: all.
        optim: also save optimizer state; the same for all checkpoints of a chain.
        pg: the ranks that share the tables; None: the group that the model was sharded over.
        overwrite: replace something at ``path`` that is not a delta.
        collections: where the checkpoint ``since`` has the collections of the model, if under other paths, such as
            ``{"model": "model.net"}``; the delta has the model's own.

    Raises:
        ConfigError: no such tables or collections, ``since`` is no step, ``pg`` is not the group that the tables are
            spread over, a path is none, or a URL.
        CheckpointError: changes since then are not known, or all evicted keys are not: the message says since when
            they are, and that a full dump is always possible. The checkpoint ``since`` is not one, has not these
            tables, was written with another ``optim``, or is of another run: the model has neither written it nor
            been loaded from it; it or another full checkpoint is at ``path``. Or ``path``
            cannot be written, is taken, or the disk is full. What was there is unchanged.
        RemoteRankError: that happened on another rank.
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    renamed = {} if collections is None else collections
    with chosen("incremental_dump()", model, table_names, pg) as (tables, ranks):
        ranks.locally(lambda: check_collections(renamed, model))
        staging = ranks.locally(lambda: Staging(path))
        starts = ranks.first(lambda: _starts(since, tables, bool(optim), staging, overwrite, renamed))
        for table in tables:
            table.group.changes.begin()
        lags = ranks.together(
            lambda: [_checked_lag(table, starts[table.collection, table.name][0]) for table in tables]
        )
        lag_by_table = [max(by_rank) for by_rank in zip(*lags, strict=True)]
        extracts = ranks.locally(lambda: [
            _extract(table, *starts[table.collection, table.name], lag)
            for table, lag in zip(tables, lag_by_table, strict=True)
        ])  # fmt: skip
        write_checkpoint(staging, extracts, bool(optim), ranks, overwrite)


def _starts(
    since: Union[int, PathLike],
    tables: Sequence[DynamicTable],
    optim: bool,
    staging: Staging,
    overwrite: bool,
    collections: Collections,
) -> _Starts:
    if not overwrite:
        _refuse_full(staging)
    if isinstance(since, (str, os.PathLike)):
        return _starts_at(local_path(since, "since"), tables, optim, staging, collections)
    if isinstance(since, bool) or not isinstance(since, int) or since < 0:
        raise ConfigError(
            f"since={since!r} is no step; give the path of the earlier checkpoint, or a number of training steps from "
            "0 on"
        )
    return {(table.collection, table.name): (since, _history(table)) for table in tables}


def _history(table: DynamicTable) -> History:
    return table.group.changes.checkpoints[table.index]


def _refuse_full(staging: Staging) -> None:
    """Raises if a full checkpoint would be replaced by a delta, which may be of no use without it."""
    try:
        kind = read_manifest(finished(staging.path)).kind
    except CheckpointError:
        return  # whatever is there: Staging decides about it
    if kind == "full":
        raise CheckpointError(
            f"{staging.path} holds a full checkpoint, which a delta cannot stand for; choose another path, or "
            "overwrite=True (--overwrite) to replace it"
        )


def _starts_at(
    earlier: Path, tables: Sequence[DynamicTable], optim: bool, staging: Staging, collections: Collections
) -> _Starts:
    """The clocks of the checkpoint ``earlier``, which must be one that the tables have been through."""
    folder = finished(earlier)
    if os.path.realpath(earlier) == os.path.realpath(staging.path):
        raise CheckpointError(f"{earlier}: the delta would take the place of the checkpoint that it follows; "
                              "choose another path")  # fmt: skip
    manifest: Manifest = read_manifest(folder)
    records = {(name, table): record for name, stored in manifest.tables.items() for table, record in stored.items()}
    starts = {}
    for table in tables:
        name = stored_name(records, table, collections)
        if name is None:
            raise CheckpointError(f"{not_stored(folder, records, table, collections)}, or make a full dump")
        record = records[name]
        if record.optimizer.saved != optim:
            raise CheckpointError(
                f"{folder}: table '{table.name}' was saved with optim={record.optimizer.saved}; use the same for the "
                "deltas that follow it"
            )
        history = _history(table)
        if not is_in(record, history, table.name):
            raise CheckpointError(
                f"{folder}: table '{table.name}' of the model has not been in this state, that of step {record.clock}; "
                f"it has been written to or read from, in this run, {described(history)}: give one of these, or make a "
                "full dump"
            )
        starts[table.collection, table.name] = (record.clock, adopted(history, record, table.name))
    return starts


def _checked_lag(table: DynamicTable, since: int) -> int:
    """How late updates were; after checks that all changes since then are known."""
    changes, clock = table.group.changes, int(table.group.clock[table.index])
    if since > clock:
        raise CheckpointError(
            f"table '{table.name}' is at step {clock}: nothing can have changed since step {since}; "
            "give a checkpoint of this run"
        )
    first = changes.first_step(table.index)
    if 0 < since < first:
        raise CheckpointError(
            f"table '{table.name}': changes since step {since} are not known, only those since step {first}; make a "
            "full dump, and deltas more often after it (changes are noted from the first dump or load on, in CUDA "
            "graphs that are captured after it, and as far as there is room for evicted keys)"
        )
    return changes.lag


def _extract(table: DynamicTable, since: int, history: History, lag: int) -> Extract:
    changes, index = table.group.changes, table.index
    # Since step 0 every row is there, and older ones do not count: keys that have gone need not be known.
    known = changes.first_step(index) <= since
    gone = changes.evicted(index, since).numpy() if known else np.empty(0, np.int64)
    return Extract(table, history, None if since == 0 else changes.touched(index, since, lag), gone, since)
