"""Writing the files of a table: at any offset, with checksums as they go, on disk before they count as written."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.crc import Span, SpanSums, crc_of_segments
from dynamicemb.checkpoint.files.lineage import History, followed
from dynamicemb.checkpoint.files.manifest import MANIFEST, SEGMENT_ROWS, Manifest, PartRecord, TableRecord, file_name
from dynamicemb.checkpoint.files.schema import EVICTED, EVICTED_PART, Part, Rows, TableSchema
from dynamicemb.checkpoint.files.staging import Staging
from dynamicemb.errors import CheckpointError
from dynamicemb.version import __version__

__all__ = ["CheckpointWriter", "TableWriter", "part_records", "reserve", "write_manifest", "writing_behind"]


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2
#: Fewer bytes than these are left to the last ``fsync``.
_WRITE_BACK_BYTES = 1 << 20


def reserve(folder: Path, collection: str, table: str, rows_by_part: Mapping[Part, int]) -> None:
    """Creates a table's files at their full size, so that a full disk is noticed before anything is written.

    Raises:
        CheckpointError: there is no room, or the files cannot be created.
    """
    for part, rows in rows_by_part.items():
        path = folder / collection / file_name(table, part.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _allocate(descriptor, rows * part.row_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            size = f" ({rows * part.row_bytes} bytes)"
            raise CheckpointError(f"{path}: {error.strerror}{size}; make room, or choose another path") from error


def _allocate(descriptor: int, num_bytes: int) -> None:
    if num_bytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except (AttributeError, OSError) as error:  # not on every system, nor on every file system
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, num_bytes)


def _start_writing_back(descriptor: int, offset: int, num_bytes: int) -> None:
    """Sends what was written on its way to the disk, which works while the next rows are prepared: a dump that leaves
    everything to the last ``fsync`` takes a third longer. A hint that exists on Linux alone."""
    if _sync_file_range is not None and num_bytes >= _WRITE_BACK_BYTES:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)


class _PartWriter:
    def __init__(self, path: Path, part: Part, first: int) -> None:
        self._path, self._part = path, part
        self._next = first
        self._sums = SpanSums(first, part.row_bytes, SEGMENT_ROWS)
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error

    def write(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        assert array.dtype == self._part.empty(0).dtype and array.shape == self._part.shape(array.shape[0])
        self._sums.add(array)
        view = array.reshape(-1).view(np.uint8).data
        offset, done = self._next * self._part.row_bytes, 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            message = f"{self._path}, offset {offset + done}: {error.strerror}; make room, or choose another path"
            raise CheckpointError(message) from error
        _start_writing_back(self._descriptor, offset, len(view))
        self._next += array.shape[0]

    def finish(self) -> list[Span]:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error.strerror}; make room, or choose another path") from error
        return self._sums.spans()

    def close(self) -> None:
        os.close(self._descriptor)


class TableWriter:
    """Writes a run of consecutive rows of one table; other processes may write others at the same time.

    Args:
        folder: of the checkpoint, unfinished.
        collection, table: which table.
        parts: what is written; every array that is written has all of them.
        first: number of the first row.
    """

    def __init__(self, folder: Path, collection: str, table: str, parts: tuple[Part, ...], first: int = 0) -> None:
        self.spans: dict[str, list[Span]] = {}
        self._writers: dict[str, _PartWriter] = {}
        (folder / collection).mkdir(parents=True, exist_ok=True)
        for part in parts:
            self._writers[part.name] = _PartWriter(folder / collection / file_name(table, part.name), part, first)

    def write(self, rows: Rows) -> None:
        """The rows that follow those written before.

        Raises:
            CheckpointError: they cannot be written, for want of room for instance.
        """
        for name, writer in self._writers.items():
            writer.write(rows.arrays[name])

    def finish(self) -> None:
        """Waits until everything is on disk. :attr:`spans` has the checksums by part then."""
        self.spans = {name: writer.finish() for name, writer in self._writers.items()}

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


@contextmanager
def writing_behind(writer: TableWriter) -> Iterator[Callable[[Rows], None]]:
    """A function that hands rows to a thread, which writes them while the next ones are prepared.

    When the block has ended, everything is on disk and ``writer`` is closed. What fails in the thread is raised by the
    function or at the end.
    """
    pending: deque[Future[None]] = deque()

    def write(rows: Rows) -> None:
        while len(pending) > 1:  # one is being written, one waits: memory stays bounded
            pending.popleft().result()
        pending.append(pool.submit(writer.write, rows))

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="dynamicemb-write") as pool:
            yield write
            for job in pending:
                job.result()
            writer.finish()
    finally:
        writer.close()


def part_records(
    parts: Iterable[Part], spans_by_writer: Sequence[Mapping[str, list[Span]]], rows: int
) -> dict[str, PartRecord]:
    """The manifest's entries of files of ``rows`` rows, from the checksums of all that wrote them."""
    records = {}
    for part in parts:
        spans = [span for spans in spans_by_writer for span in spans[part.name]]
        records[part.name] = PartRecord(rows, tuple(crc_of_segments(spans, rows, part.row_bytes, SEGMENT_ROWS)))
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint. Waits until it is on disk."""
    path = folder / MANIFEST
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; make room, or choose another path") from error


class CheckpointWriter:
    """Writes a whole checkpoint from one process, table by table, rows in ascending order of their mixed keys.

    A context manager: at its end the checkpoint takes its place; if an error ends it, nothing is left behind.

    Args:
        path: where to.
        kind: ``full`` or ``delta``.
        overwrite: replace something at ``path`` that is no checkpoint.

    Raises:
        CheckpointError: ``path`` is taken, or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str = "full", overwrite: bool = False) -> None:
        self._staging = Staging(path)
        self._kind = kind
        self._overwrite = overwrite
        self._tables: dict[str, dict[str, TableRecord]] = {}
        self._open: list[SequentialTableWriter] = []

    def __enter__(self) -> CheckpointWriter:
        self._staging.begin(self._overwrite)
        return self

    def table(self, collection: str, table: str, schema: TableSchema) -> SequentialTableWriter:
        """A writer for one table; its ``finish`` adds the table to the checkpoint."""
        delta = self._kind == "delta"
        self._open.append(SequentialTableWriter(self, self._staging.folder, collection, table, schema, delta))
        return self._open[-1]

    def add(self, collection: str, table: str, record: TableRecord) -> None:
        self._tables.setdefault(collection, {})[table] = record

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for table in self._open:
            table.close()
        if error is not None:
            self._staging.abandon()
            return
        write_manifest(self._staging.folder, Manifest(self._kind, self._tables, __version__))
        self._staging.commit()


class SequentialTableWriter:
    """All rows of one table, one piece after the other; see :meth:`CheckpointWriter.table`."""

    def __init__(
        self, checkpoint: CheckpointWriter, folder: Path, collection: str, table: str, schema: TableSchema, delta: bool
    ) -> None:
        self._checkpoint, self._collection, self._table, self._schema = checkpoint, collection, table, schema
        self._rows = TableWriter(folder, collection, table, schema.parts)
        self._evicted = TableWriter(folder, collection, table, (EVICTED_PART,)) if delta else None
        self.rows = self._evicted_rows = 0

    def write(self, rows: Rows) -> None:
        """The next rows, in ascending order of their mixed keys."""
        self._rows.write(rows)
        self.rows += len(rows)

    def write_evicted(self, keys: np.ndarray) -> None:
        """The next keys that have gone, int64, in ascending order of their mixed keys; only in a delta."""
        assert self._evicted is not None
        self._evicted.write(Rows({EVICTED: keys}))
        self._evicted_rows += keys.size

    def close(self) -> None:
        """Closes what :meth:`finish` has not: the files of a table that an error cut short."""
        self._rows.close()
        if self._evicted is not None:
            self._evicted.close()

    def finish(self, record: TableRecord, history: Optional[History] = None) -> None:
        """Completes the table.

        Args:
            record: what the manifest will say, but for rows, parts, schema and segments.
            history: the table's past, of which it then says what it follows; None: what ``record`` says.
        """
        self._rows.finish()
        self._rows.close()
        parts = part_records(self._schema.parts, [self._rows.spans], self.rows)
        if self._evicted is not None:
            self._evicted.finish()
            self._evicted.close()
            parts |= part_records([EVICTED_PART], [self._evicted.spans], self._evicted_rows)
        record = dataclasses.replace(
            record, schema=self._schema, rows=self.rows, parts=parts, segment_rows=SEGMENT_ROWS
        )
        if history is not None:
            record = dataclasses.replace(record, follows=followed(history, record, self._table))
        self._checkpoint.add(self._collection, self._table, record)
