"""A full checkpoint and the deltas that follow it, written as the full checkpoint that they stand for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.chain import ChainPass, check_links
from dynamicemb.checkpoint.files.lineage import merged_history
from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.paths import PathLike, local_path
from dynamicemb.checkpoint.files.reader import Checkpoint, StoredTable
from dynamicemb.checkpoint.files.writer import CheckpointWriter, SequentialTableWriter
from dynamicemb.checkpoint.passes import read_ahead
from dynamicemb.errors import CheckpointError, ConfigError

__all__ = ["merge"]

Progress = Callable[[str, int, int], None]


def merge(
    paths: Iterable[PathLike], dst: PathLike, overwrite: bool = False, progress: Optional[Progress] = None
) -> None:
    """Writes the checkpoint that a chain stands for: bit for bit that which a dump would have written right after the
    last delta. One process, no model, no GPU; memory does not depend on sizes.

    Args:
        paths: a full checkpoint and the deltas that follow it, in order; the result is a full one. Or deltas alone, in
            order; the result is one delta, since the step that the earliest of them begins at.
        dst: folder to write; it may be one of ``paths``, which is replaced when everything is on disk.
        overwrite: replace something at ``dst`` that is not a checkpoint.
        progress: called with (table, rows done, rows to do) after every piece.

    Raises:
        CheckpointError: the paths are no chain (a gap, a wrong order, other tables), a file is missing or damaged, or
            ``dst`` cannot be written. Nothing is changed at ``dst``.
    """
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise ConfigError(f"paths={paths!r} is one path; give a list: a full checkpoint and the deltas that follow it")
    paths = [local_path(path, "paths") for path in paths]
    local_path(dst, "dst")
    if not paths:
        raise CheckpointError("no checkpoints to merge; give a full one and the deltas that follow it")
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(path)) for path in paths]
        kind = checkpoints[0].manifest.kind
        chains = _chains(checkpoints)
        with CheckpointWriter(dst, kind, overwrite) as writer:
            for (collection, name), tables in chains.items():
                table = writer.table(collection, name, tables[0].record.schema)
                _write(tables, table, progress)
                table.finish(_merged_record(tables), merged_history([one.record for one in tables], name))


def _chains(checkpoints: list[Checkpoint]) -> dict[tuple[str, str], list[StoredTable]]:
    """The tables of every checkpoint, by name.

    Raises:
        CheckpointError: not all have the same tables, or those of one name are no chain.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for one, two in ((first, other), (other, first)):
            if missing := sorted(set(one.tables) - set(two.tables)):
                collection, name = missing[0]
                raise CheckpointError(
                    f"{two.path} has no table '{name}' in '{collection}', but {one.path} has; "
                    "merge checkpoints of the same tables"
                )
    chains = {}
    for path in first.tables:
        chains[path] = [checkpoint.tables[path] for checkpoint in checkpoints]
        check_links(chains[path])
    return chains


def _write(tables: list[StoredTable], writer: SequentialTableWriter, progress: Optional[Progress]) -> None:
    """Writes the merged rows, and in a delta the keys that have gone. Raises if anything that was read is wrong."""
    name, record, delta = tables[0].table, tables[-1].record, tables[0].record.since is not None
    rows = ChainPass(tables, 0, 2**64)
    total = rows.rows if delta else record.table_rows
    keys_sum = 0
    for merged in read_ahead(rows.merged()):
        writer.write(merged.piece.rows)
        if delta:
            writer.write_evicted(merged.gone)
        keys_sum += int(merged.piece.mixed.sum(dtype=np.uint64))
        if progress is not None:
            progress(name, writer.rows, max(total, writer.rows))
    problems = [str(one) for table, spans in zip(tables, rows.spans, strict=True) for one in table.check_spans(spans)]
    if not problems and not delta and (writer.rows, keys_sum % 2**64) != (record.table_rows, record.keys_sum):
        problems.append(
            f"{tables[-1].path('keys')}, offset 0: {writer.rows} keys, which are not the {record.table_rows} that the "
            "table had; a file or a delta is not its own: restore it from a copy"
        )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)


def _merged_record(tables: list[StoredTable]) -> TableRecord:
    since = [table.record.since for table in tables]
    earliest = None if since[0] is None else min(step for step in since if step is not None)
    return dataclasses.replace(tables[-1].record, since=earliest, follows=None)
