"""From a checkpoint to the tables of a model, at any number of ranks: each reads one contiguous run of rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np
import torch.distributed as dist
from torch import nn

from dynamicemb.checkpoint.arrays import from_disk
from dynamicemb.checkpoint.chain import ChainedTable
from dynamicemb.checkpoint.files.lineage import history_of
from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.paths import PathLike
from dynamicemb.checkpoint.files.reader import Checkpoint
from dynamicemb.checkpoint.passes import FullTable, Pass, Spans, TableSource, problems_of, read_ahead
from dynamicemb.checkpoint.progress import Reporter, progress
from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.checkpoint.selection import (
    Collections,
    TableNames,
    check_collections,
    chosen,
    not_stored,
    progress_of,
    stored_name,
)
from dynamicemb.errors import CheckpointError, ConfigError, DynamicEmbWarning
from dynamicemb.kernels.hashing import owner_range
from dynamicemb.names import did_you_mean, listed
from dynamicemb.shard.tables import DynamicTable
from dynamicemb.table.compatibility import SavedTable, check_fit
from dynamicemb.table.filling import TableFilling

__all__ = ["DynamicEmbLoad"]


def DynamicEmbLoad(  # noqa: N802 - the name that users of other implementations know
    path: Union[PathLike, Iterable[PathLike]],
    model: nn.Module,
    table_names: TableNames = None,
    optim: Optional[bool] = False,
    pg: Optional[dist.ProcessGroup] = None,
    *,
    collections: Optional[Collections] = None,
) -> None:
    """Replaces the contents of the dynamic tables of ``model`` by those of a checkpoint. Called by all ranks together.

    The number of ranks may be any. Each rank reads its rows once. Checksums, order and duplicates are checked on the
    way; if a table holds rows already, everything is read and checked first, and then read again. So a checkpoint that
    is damaged leaves the model as it was.

    Args:
        path: folder of the checkpoint, or of a full one and of the deltas that follow it, in order.
        model: the sharded model, wrapped or not.
        table_names: tables by path of their collection, the model itself being called ``model``. None: all; then the
            model and the checkpoint have the same tables.
        optim: also restore optimizer state, update steps and hyperparameters (the learning rate among them), with which
            training goes on exactly. Without, they begin anew, with the model's own hyperparameters.
        pg: the ranks that share the tables; None: the group that the model was sharded over.
        collections: where the checkpoint has the collections of the model, if under other paths: ``{"model":
            "model.net"}`` loads what was written of the collection at ``model.net`` into that at ``model``. Deltas may
            have either path.

    Where a bucket has more rows than slots and the table cannot grow, those with the highest scores are kept; a
    :class:`~dynamicemb.errors.DynamicEmbWarning` says how many were left out.

    Raises:
        ConfigError: no such tables or collections, ``pg`` is not the group that they are spread over, or a path is
            none, or is a URL: checkpoints are read from file systems.
        CheckpointError: the checkpoint is missing, damaged, incomplete or does not fit. The model is unchanged.
        RemoteRankError: that happened on another rank.
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    renamed = {} if collections is None else collections
    with chosen("DynamicEmbLoad()", model, table_names, pg) as (tables, ranks), ExitStack() as stack:
        ranks.locally(lambda: check_collections(renamed, model))
        checkpoints = ranks.locally(lambda: [stack.enter_context(Checkpoint(one)) for one in _paths(path)])
        jobs = ranks.locally(lambda: _jobs(checkpoints, tables, table_names is None, bool(optim), renamed))
        _Loading(jobs, ranks).run()


@dataclass(frozen=True)
class _Job:
    """One table and where its rows come from."""

    table: DynamicTable
    source: TableSource
    optim: bool

    def own_rows(self, ranks: Ranks) -> Pass:
        return self.source.between(*owner_range(ranks.rank, ranks.size))


def _paths(path: Union[PathLike, Iterable[PathLike]]) -> list[PathLike]:
    several = isinstance(path, Iterable) and not isinstance(path, (str, bytes, os.PathLike))
    paths = list(path) if several else [path]  # type: ignore[arg-type]
    if not paths:
        raise CheckpointError("no checkpoint to load; give the path of one, or of a full one and its deltas")
    return paths  # type: ignore[return-value]


def _jobs(
    checkpoints: list[Checkpoint], tables: list[DynamicTable], every: bool, optim: bool, collections: Collections
) -> list[_Job]:
    stored = {collection for checkpoint in checkpoints for collection, _ in checkpoint.tables}
    for here, there in collections.items():
        if there not in stored:
            hint = did_you_mean(there, sorted(stored))
            raise ConfigError(
                f"collections[{here!r}]: {checkpoints[-1].path} has no collection {there!r}{hint}; it has "
                f"{listed(sorted(stored)) or 'none'}"
            )
    jobs = []
    for table in tables:
        source = _source(checkpoints, table, collections)
        _check_fit(checkpoints[-1], table, source.record, optim)
        jobs.append(_Job(table, source, optim))
    if every:
        loaded = {(job.source.tables[-1].collection, job.table.name) for job in jobs}
        if extra := sorted(set(checkpoints[-1].tables) - loaded):
            raise CheckpointError(
                f"{checkpoints[-1].path} has table '{extra[0][1]}' in '{extra[0][0]}', which the model does not; "
                "name the tables to load in table_names"
            )
    return jobs


def _source(checkpoints: list[Checkpoint], table: DynamicTable, collections: Collections) -> TableSource:
    stored = []
    for checkpoint in checkpoints:
        name = stored_name(checkpoint.tables, table, collections)
        if name is None:
            raise CheckpointError(not_stored(checkpoint.path, checkpoint.tables, table, collections))
        stored.append(checkpoint.tables[name])
    return FullTable(stored[0]) if len(stored) == 1 and stored[0].record.since is None else ChainedTable(stored)


def _check_fit(checkpoint: Checkpoint, table: DynamicTable, record: TableRecord, optim: bool) -> None:
    """Raises unless rows of ``record`` can be rows of ``table``."""
    where, saved = f"{checkpoint.path}: table '{table.name}'", record.optimizer.saved
    check_fit(
        where,
        SavedTable(
            dim=record.schema.dim,
            dtype=record.schema.dtype,
            evict_strategy=record.evict_strategy,
            optimizer=record.optimizer.kind if optim and saved else None,
            states=dict(record.schema.states) if optim and saved else None,
        ),
        table.group.configs[table.index],
        without_optimizer="load it with optim=False",
    )
    if optim and not saved:
        raise CheckpointError(f"{where} was saved without optimizer state; load it with optim=False")


class _Loading:
    """The passes over a checkpoint's tables, and what follows from what they find."""

    def __init__(self, jobs: list[_Job], ranks: Ranks) -> None:
        self._jobs, self._ranks = jobs, ranks

    def run(self) -> None:
        occupied = self._ranks.gather(any(job.table.group.contents(job.table.index).count() for job in self._jobs))
        if any(occupied):
            self._read("verify", None)
        before = [job.table.group.progress(job.table.index) for job in self._jobs]
        fillings: list[TableFilling] = []
        try:
            self._read("load", fillings)
        except BaseException:
            for job, progress_before in zip(self._jobs, before, strict=True):
                group, index = job.table.group, job.table.index
                group.contents(index).clear(group.configs[index].geometry())
                group.restore(index, progress_before, 0)
            raise
        self._finish(fillings)

    def _read(self, action: str, fillings: Optional[list[TableFilling]]) -> None:
        """Reads and checks this rank's rows of every table, and fills the tables with them if there are fillings."""
        passes = self._ranks.locally(lambda: [job.own_rows(self._ranks) for job in self._jobs])
        with progress(action, sum(one.rows for one in passes), shown=self._ranks.is_first) as report:
            sums = self._ranks.locally(lambda: [
                self._read_table(job, one, report, fillings) for job, one in zip(self._jobs, passes, strict=True)
            ])  # fmt: skip
        found = self._ranks.gather([(one.spans, count, keys_sum) for one, (count, keys_sum) in zip(passes, sums)])
        problems: list[str] = []
        for job, by_rank in zip(self._jobs, zip(*found, strict=True), strict=True):
            problems += _problems(job, by_rank)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)

    def _read_table(
        self, job: _Job, rows: Pass, report: Reporter, fillings: Optional[list[TableFilling]]
    ) -> tuple[int, int]:
        """Returns how many rows there were, and the sum of their mixed keys modulo 2**64."""
        report.table(job.table.name)
        filling = None
        if fillings is not None:
            filling = TableFilling(job.table.group, job.table.index, rows.rows, self._slots(job))
            fillings.append(filling)
        count, keys_sum = 0, 0
        for piece in read_ahead(rows):
            count, keys_sum = count + len(piece.rows), keys_sum + int(piece.mixed.sum(dtype=np.uint64))
            if filling is not None:
                filling.add(from_disk(piece.rows, job.source.record.schema, job.optim))
            report.advance(len(piece.rows))
        if filling is not None:
            filling.finish()
        return count, keys_sum % 2**64

    def _slots(self, job: _Job) -> Optional[int]:
        """The size that this rank's part of the table had, if it was spread over as many ranks of the same capacity."""
        placement, config = job.source.record.placement, job.table.group.configs[job.table.index]
        if placement is None or job.source.record.bucket_capacity != config.bucket_capacity:
            return None
        same = placement.world_size == self._ranks.size and placement.max_slots == config.geometry().max_slots
        return placement.slots[self._ranks.rank] if same else None

    def _finish(self, fillings: list[TableFilling]) -> None:
        left_out = np.sum(self._ranks.gather([filling.left_out for filling in fillings]), axis=0)
        messages = []
        for job, filling, missing in zip(self._jobs, fillings, left_out.tolist(), strict=True):
            table, record = job.table, job.source.record
            restored = progress_of(table, record, job.optim, self._ranks.is_first)
            table.group.restore(table.index, restored, filling.kept)
            table.optimizer.restore_learning_rate(table.index, restored.hyperparameters[0])
            # Deltas may follow what was loaded, if the table is in that state: with all rows and all that is in them.
            whole = not missing and (job.optim or not record.schema.states)
            records = [stored.record for stored in job.source.tables]
            table.group.changes.checkpoints[table.index] = history_of(records, table.name) if whole else ()
            if missing:
                messages.append(
                    f"table '{table.name}': {missing} of {record.table_rows} rows, those with the least scores"
                )
        if messages:
            warnings.warn(
                f"left out for want of room: {'; '.join(messages)}; raise the capacity to keep all of them",
                DynamicEmbWarning,
                stacklevel=4,
            )


def _problems(job: _Job, by_rank: Sequence[tuple[Spans, int, int]]) -> list[str]:
    """What is wrong with a table, from what all ranks have read of it: checksums first, then what is missing."""
    spans, counts, keys_sums = zip(*by_rank, strict=True)
    problems = [str(problem) for problem in problems_of(job.source, spans)]
    record = job.source.record
    if not problems and (sum(counts), sum(keys_sums) % 2**64) != (record.table_rows, record.keys_sum):
        problems.append(
            f"{job.source.tables[-1].path('keys')}, offset 0: {sum(counts)} keys, which are not the "
            f"{record.table_rows} that the table had; a file or a delta is not its own: restore it from a copy"
        )
    return problems
