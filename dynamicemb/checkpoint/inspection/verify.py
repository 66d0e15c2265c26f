"""Everything that is wrong with a checkpoint, not just the first thing: sizes, checksums, order, sums, shares of ranks.

In bounded memory, reading every byte once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dynamicemb.checkpoint.files.manifest import MANIFEST, Manifest, read_manifest
from dynamicemb.checkpoint.files.paths import PathLike, local_path
from dynamicemb.checkpoint.files.staging import finished
from dynamicemb.checkpoint.inspection.table_check import Finding, TableCheck
from dynamicemb.errors import CheckpointError

__all__ = ["Finding", "Verification", "verify"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """What has been checked, and what was found.

    Attributes:
        path: of the checkpoint.
        kind: ``full`` or ``delta``; None if the manifest cannot be read.
        tables, rows, files, num_bytes: how much the manifest says there is.
        findings: everything that is wrong; empty if all is well.
        notes: what is not wrong, but should be known: files that do not belong, an unfinished dump.
    """

    path: Path
    kind: Optional[str]
    tables: int
    rows: int
    files: int
    num_bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def verify(path: PathLike, progress: Optional[Progress] = None) -> Verification:
    """Checks sizes, checksums, order, duplicate keys, the keys' sum, what deltas say has gone, and the ranks' shares.

    Args:
        path: folder of a checkpoint, full or delta.
        progress: called with (file, bytes read, bytes of the checkpoint).
    """
    folder = finished(local_path(path))
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        message = str(error).removeprefix(f"{folder / MANIFEST}")
        offset = None
        if message.startswith(", offset "):
            number, _, message = message.removeprefix(", offset ").partition(": ")
            offset = int(number)
        finding = Finding(MANIFEST, offset, message.removeprefix(": "))
        return Verification(folder, None, 0, 0, 0, 0, (finding,), tuple(_notes(folder, None)))
    records = [record for tables in manifest.tables.values() for record in tables.values()]
    meter = _Meter(progress, sum(record.num_bytes for record in records))
    findings = [
        finding
        for collection, tables in manifest.tables.items()
        for table, record in tables.items()
        for finding in TableCheck(folder, collection, table, record, meter.add).run()
    ]
    return Verification(
        path=folder,
        kind=manifest.kind,
        tables=len(records),
        rows=sum(record.rows for record in records),
        files=len(manifest.files()),
        num_bytes=meter.total,
        findings=tuple(findings),
        notes=tuple(_notes(folder, manifest)),
    )


def _notes(folder: Path, manifest: Optional[Manifest]) -> Iterator[str]:
    unfinished = folder.with_name(folder.name.removesuffix(".previous") + ".unfinished")
    if os.path.exists(unfinished):
        yield f"{unfinished.name} beside it is a dump that is running, or was ended before it was whole"
    if manifest is None:
        return
    untold = [f"{name}/{table}" for name, tables in manifest.tables.items() for table, one in tables.items()
              if one.follows is None]  # fmt: skip
    if untold:
        more, does, was = (f" and {len(untold) - 1} more", "do", "were") if len(untold) > 1 else ("", "does", "was")
        yield (
            f"{untold[0]}{more} {does} not say what came before, and {was} converted or written by an earlier version: "
            "whether a delta is of its run cannot be told"
        )
    own = set(manifest.files())
    for file in sorted(folder.rglob("*")):
        if not file.is_dir() and str(file.relative_to(folder)) not in own:
            yield f"{file.relative_to(folder)} does not belong to the checkpoint"


class _Meter:
    """Bytes read so far, passed on."""

    def __init__(self, progress: Optional[Progress], total: int) -> None:
        self._progress, self.total, self._done = progress, total, 0

    def add(self, file: str, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(file, self._done, self.total)
