"""From the tables of a model to a checkpoint: all ranks write the same files, each its own run of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch.distributed as dist
from torch import nn

from dynamicemb.checkpoint.arrays import RowBuffers
from dynamicemb.checkpoint.files.crc import Span
from dynamicemb.checkpoint.files.lineage import History, advanced, followed
from dynamicemb.checkpoint.files.manifest import Manifest, TableRecord
from dynamicemb.checkpoint.files.paths import PathLike
from dynamicemb.checkpoint.files.schema import EVICTED, EVICTED_PART, Rows, TableSchema
from dynamicemb.checkpoint.files.staging import Staging
from dynamicemb.checkpoint.files.writer import TableWriter, part_records, reserve, write_manifest, writing_behind
from dynamicemb.checkpoint.progress import Reporter, progress
from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.checkpoint.selection import TableNames, check_storable, chosen, record_of, schema_of
from dynamicemb.shard.tables import DynamicTable
from dynamicemb.table.changes import Selection, Survey
from dynamicemb.table.group import TableProgress
from dynamicemb.version import __version__

__all__ = ["DynamicEmbDump", "Extract", "write_checkpoint"]

#: Bytes of rows that are on their way from the table to the files, in each of at most three pieces.
_PIECE_BYTES = 16 << 20


def DynamicEmbDump(  # noqa: N802 - the name that users of other implementations know
    path: PathLike,
    model: nn.Module,
    table_names: TableNames = None,
    optim: Optional[bool] = False,
    pg: Optional[dist.ProcessGroup] = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the dynamic tables of ``model`` to a checkpoint. Called by all ranks together, between two steps.

    The checkpoint appears at ``path`` at once when all of it is on disk; one that was there before stays whole until
    then. Its files do not depend on the number of ranks; ``docs/format.md`` describes them. From the first dump on the
    model notes what changes, for :func:`~dynamicemb.checkpoint.incremental.incremental_dump`.

    Args:
        path: folder of the checkpoint, the same on every rank, on a file system that all of them see.
        model: the sharded model, wrapped or not.
        table_names: tables by path of their collection, the model itself being called ``model``; None: all.
        optim: also save optimizer state, without which training cannot go on exactly.
        pg: the ranks that share the tables; None: the group that the model was sharded over.
        overwrite: replace something at ``path`` that is not a checkpoint.

    Raises:
        ConfigError: no such tables, or ``pg`` is not the group that they are spread over. ``path`` is no path, or is a
            URL: checkpoints are written to file systems. A table or collection has a name that no file can have.
        CheckpointError: ``path`` cannot be written, is taken, or the disk is full. What was there is unchanged.
        RemoteRankError: that happened on another rank.
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    with chosen("DynamicEmbDump()", model, table_names, pg) as (tables, ranks):
        staging = ranks.locally(lambda: Staging(path))
        for table in tables:
            table.group.changes.begin()
        extracts = [Extract(table, table.group.changes.checkpoints[table.index]) for table in tables]
        write_checkpoint(staging, extracts, bool(optim), ranks, overwrite)


@dataclass(frozen=True)
class Extract:
    """What one rank writes of a table.

    Attributes:
        history: checkpoints that the table has been through, oldest first.
        selected: which rows; None: all.
        gone: in a delta: keys that are no longer there, int64 [n] in ascending order of the mixed key.
        since: in a delta: the step that it begins at.
    """

    table: DynamicTable
    history: History
    selected: Optional[Selection] = None
    gone: Optional[np.ndarray] = None
    since: Optional[int] = None

    def share(self) -> _Share:
        group, index = self.table.group, self.table.index
        return _Share(
            survey=group.changes.survey(index, self.selected),
            gone=0 if self.gone is None else self.gone.size,
            progress=group.progress(index),
            slots=group.storage.geometries[index].slots,
        )


@dataclass(frozen=True)
class _Share:
    """What all ranks need to know of the extract of one of them; ``gone``: how many keys are."""

    survey: Survey
    gone: int
    progress: TableProgress
    slots: int


def write_checkpoint(staging: Staging, extracts: Sequence[Extract], optim: bool, ranks: Ranks, overwrite: bool) -> None:
    """Writes the extracts of all ranks, which are of the same tables: all full ones, or all deltas.

    Raises:
        CheckpointError, RemoteRankError: as :func:`DynamicEmbDump`.
    """
    ranks.locally(lambda: check_storable(extract.table for extract in extracts))
    shares = ranks.together(lambda: [extract.share() for extract in extracts])
    jobs = [_Job(one, list(by_rank), optim, ranks.rank) for one, by_rank in zip(extracts, zip(*shares), strict=True)]
    try:
        ranks.first(lambda: _prepare(staging, jobs, overwrite))
        with progress("dump", sum(job.own.survey.selected for job in jobs), shown=ranks.is_first) as report:
            written = ranks.together(lambda: [job.write(staging, report) for job in jobs])
        histories = ranks.first(lambda: _complete(staging, jobs, written))
        for extract, history in zip(extracts, histories, strict=True):
            extract.table.group.changes.checkpoints[extract.table.index] = history
    except BaseException:
        if ranks.is_first:
            staging.abandon()
        raise


def _prepare(staging: Staging, jobs: list[_Job], overwrite: bool) -> None:
    staging.begin(overwrite)
    for job in jobs:
        rows_by_part = dict.fromkeys(job.schema.parts, job.rows)
        if job.extract.gone is not None:
            rows_by_part[EVICTED_PART] = job.gone
        reserve(staging.folder, job.table.collection, job.table.name, rows_by_part)


def _complete(staging: Staging, jobs: list[_Job], written: list[list[_Spans]]) -> list[History]:
    """Makes the checkpoint appear. Returns the history of each table, of which it is part now."""
    tables: dict[str, dict[str, TableRecord]] = {}
    histories = []
    for job, by_rank in zip(jobs, zip(*written, strict=True), strict=True):
        record, history, name = job.record(by_rank), job.extract.history, job.table.name
        record = dataclasses.replace(record, follows=followed(history, record, name))
        tables.setdefault(job.table.collection, {})[name] = record
        histories.append(advanced(history, record, name))
    kind = "full" if all(job.extract.since is None for job in jobs) else "delta"
    write_manifest(staging.folder, Manifest(kind, tables, __version__))
    staging.commit()
    return histories


#: Checksums of what one rank wrote of a table, by part.
_Spans = dict[str, list[Span]]


class _Job:
    """One table: what this rank writes of it, and where.

    Args:
        extract: of this rank.
        shares: of all ranks.
        optim: whether optimizer state is saved.
        rank: this one.

    Attributes:
        own: the share of this rank.
        rows, gone: how many of all ranks.
    """

    def __init__(self, extract: Extract, shares: list[_Share], optim: bool, rank: int) -> None:
        self.extract, self.table, self.own = extract, extract.table, shares[rank]
        self.schema: TableSchema = schema_of(extract.table, optim)
        self.rows, self.gone = sum(one.survey.selected for one in shares), sum(one.gone for one in shares)
        self._first = sum(one.survey.selected for one in shares[:rank])
        self._first_gone = sum(one.gone for one in shares[:rank])
        self._shares, self._optim = shares, optim

    def write(self, staging: Staging, report: Reporter) -> _Spans:
        report.table(self.table.name)
        return self._write_rows(staging, report) | self._write_gone(staging)

    def _write_rows(self, staging: Staging, report: Reporter) -> _Spans:
        contents = self.table.group.contents(self.table.index)
        piece_rows = max(1, _PIECE_BYTES // self.schema.row_bytes)
        writer = TableWriter(staging.folder, self.table.collection, self.table.name, self.schema.parts, self._first)
        # One piece is being written, one waits, one is filled.
        buffers = RowBuffers(self.schema, min(piece_rows, self.own.survey.selected), pieces=3)
        with writing_behind(writer) as write:
            for run in contents.runs(piece_rows, self.extract.selected):
                write(buffers.fill(contents, run))
                report.advance(len(run))
        return writer.spans

    def _write_gone(self, staging: Staging) -> _Spans:
        if self.extract.gone is None:
            return {}
        writer = TableWriter(staging.folder, self.table.collection, self.table.name, (EVICTED_PART,), self._first_gone)
        with writing_behind(writer) as write:
            write(Rows({EVICTED: self.extract.gone}))
        return writer.spans

    def record(self, written: Sequence[_Spans]) -> TableRecord:
        """What the manifest says of the table, from what each rank wrote."""
        record = record_of(
            self.table, self._optim, [one.progress for one in self._shares], [one.slots for one in self._shares]
        )
        parts = part_records(self.schema.parts, written, self.rows)
        if self.extract.gone is not None:
            parts |= part_records([EVICTED_PART], written, self.gone)
        return dataclasses.replace(
            record,
            rows=self.rows,
            parts=parts,
            table_rows=sum(one.survey.rows for one in self._shares),
            keys_sum=sum(one.survey.keys_sum for one in self._shares) % 2**64,
            since=self.extract.since,
        )
