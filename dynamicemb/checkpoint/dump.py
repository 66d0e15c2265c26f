"""From the tables of a model to a checkpoint: all ranks write the same files, each its own run of rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch.distributed as dist
from torch import nn

from dynamicemb.checkpoint.arrays import to_disk
from dynamicemb.checkpoint.crc import Span
from dynamicemb.checkpoint.manifest import Manifest, TableRecord
from dynamicemb.checkpoint.progress import Reporter, progress
from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.checkpoint.schema import TableSchema
from dynamicemb.checkpoint.selection import record_of, schema_of, selected_tables, shared_group
from dynamicemb.checkpoint.staging import Staging
from dynamicemb.checkpoint.writer import TableWriter, part_records, reserve, write_manifest, writing_behind
from dynamicemb.shard.tables import DynamicTable
from dynamicemb.version import __version__

__all__ = ["DynamicEmbDump"]

#: Bytes of rows that are on their way from the table to the files, in each of at most three pieces.
_PIECE_BYTES = 16 << 20


def DynamicEmbDump(  # noqa: N802 - the name that users of other implementations know
    path: str | os.PathLike[str],
    model: nn.Module,
    table_names: Optional[Mapping[str, Sequence[str]]] = None,
    optim: Optional[bool] = False,
    pg: Optional[dist.ProcessGroup] = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the dynamic tables of ``model`` to a checkpoint. Called by all ranks together, between two steps.

    The checkpoint appears at ``path`` at once when all of it is on disk; one that was there before stays whole until
    then. Its files do not depend on the number of ranks; ``docs/format.md`` describes them.

    Args:
        path: folder of the checkpoint, the same on every rank, on a file system that all of them see.
        model: the sharded model, wrapped or not.
        table_names: tables by path of their collection, the model itself being called ``model``; None: all.
        optim: also save optimizer state, without which training cannot go on exactly.
        pg: the ranks that share the tables; None: the group that the model was sharded over.
        overwrite: replace something at ``path`` that is not a checkpoint.

    Raises:
        ConfigError: no such tables, or ``pg`` is not the group that they are spread over.
        CheckpointError: ``path`` cannot be written, is taken, or the disk is full. What was there is unchanged.
        RemoteRankError: that happened on another rank.
    """
    tables = selected_tables(model, table_names)
    ranks = Ranks(shared_group(tables, pg))
    staging = Staging(path)
    jobs = [_Job.of(table, bool(optim), ranks) for table in tables]
    try:
        ranks.first(lambda: _prepare(staging, jobs, overwrite))
        with progress("dump", sum(job.rows for job in jobs), shown=ranks.is_first) as report:
            written = ranks.together(lambda: [job.write(staging, report) for job in jobs])
        ranks.first(lambda: _complete(staging, jobs, written))
    except BaseException:
        if ranks.is_first:
            staging.abandon()
        raise


def _prepare(staging: Staging, jobs: list[_Job], overwrite: bool) -> None:
    staging.begin(overwrite)
    for job in jobs:
        reserve(staging.folder, job.table.collection, job.table.name, dict.fromkeys(job.schema.parts, job.total_rows))


def _complete(staging: Staging, jobs: list[_Job], written: list[list[_Written]]) -> None:
    tables: dict[str, dict[str, TableRecord]] = {}
    for job, by_rank in zip(jobs, zip(*written, strict=True), strict=True):
        tables.setdefault(job.table.collection, {})[job.table.name] = job.completed(by_rank)
    write_manifest(staging.folder, Manifest("full", tables, __version__))
    staging.commit()


@dataclass(frozen=True)
class _Written:
    """What one rank wrote of a table: checksums by part, and the sum of its mixed keys modulo 2**64."""

    spans: dict[str, list[Span]]
    keys_sum: int


@dataclass(frozen=True)
class _Job:
    """One table: what to write of it.

    Attributes:
        record: of the manifest, but for the files.
        first, rows: this rank's rows, and the number of the first of them.
        total_rows: rows of all ranks.
    """

    table: DynamicTable
    schema: TableSchema
    record: TableRecord
    first: int
    rows: int
    total_rows: int

    @staticmethod
    def of(table: DynamicTable, optim: bool, ranks: Ranks) -> _Job:
        group, index = table.group, table.index
        here = group.contents(index).count(), group.progress(index), group.storage.geometries[index].slots
        rows, progress, slots = zip(*ranks.gather(here), strict=True)
        record = record_of(table, optim, progress, slots)
        return _Job(table, schema_of(table, optim), record, sum(rows[: ranks.rank]), here[0], sum(rows))

    def write(self, staging: Staging, report: Reporter) -> _Written:
        contents = self.table.group.contents(self.table.index)
        piece_rows = max(1, _PIECE_BYTES // self.schema.row_bytes)
        report.table(self.table.name)
        keys_sum = 0
        writer = TableWriter(staging.folder, self.table.collection, self.table.name, self.schema.parts, self.first)
        with writing_behind(writer) as write:
            for run in contents.runs(piece_rows):
                keys_sum += int(run.mixed.sum())
                write(to_disk(contents.read(run), self.schema))
                report.advance(len(run))
        return _Written(writer.spans, keys_sum % 2**64)

    def completed(self, written: Sequence[_Written]) -> TableRecord:
        return dataclasses.replace(
            self.record,
            rows=self.total_rows,
            table_rows=self.total_rows,
            keys_sum=sum(one.keys_sum for one in written) % 2**64,
            parts=part_records(self.schema.parts, [one.spans for one in written], self.total_rows),
        )
