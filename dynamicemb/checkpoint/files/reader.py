"""The files of a checkpoint: sizes checked when they are opened, checksums and order while they are read."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.crc import Span, SpanSums, crc_of_segments
from dynamicemb.checkpoint.files.manifest import Manifest, TableRecord, file_name, read_manifest
from dynamicemb.checkpoint.files.paths import PathLike, local_path
from dynamicemb.checkpoint.files.schema import EVICTED, EVICTED_PART, KEYS, Part, Rows, mixed_keys
from dynamicemb.checkpoint.files.staging import finished
from dynamicemb.errors import CheckpointError
from dynamicemb.names import listed

__all__ = ["Checkpoint", "Piece", "Problem", "Scan", "StoredTable", "named"]

#: Bytes that one piece of a table takes in memory.
PIECE_BYTES = 16 << 20
_RESTORE = "restore the file from a copy, or use an earlier checkpoint"


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a table, and their mixed keys, uint64 [n], ascending."""

    rows: Rows
    mixed: np.ndarray


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a file."""

    file: Path
    offset: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}, offset {self.offset}: {self.message}; {_RESTORE}"


def _descriptor(path: Path) -> int:
    """Opens a file. A process has a limit of open files that it may raise itself, to another, and does if it must."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return os.open(path, os.O_RDONLY)


class StoredTable:
    """One table of a checkpoint, open for reading. Rows are numbered from 0 in the order of the files.

    Args:
        folder: of the checkpoint.
        collection, table: which one.
        record: what the manifest says of it.

    Raises:
        CheckpointError: a file is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path, collection: str, table: str, record: TableRecord) -> None:
        self.folder, self.collection, self.table, self.record = folder, collection, table, record
        self._parts = {part.name: part for part, _ in record.files}
        self._descriptors: dict[str, int] = {}
        try:
            for part, entry in record.files:
                self._open(part, entry.rows)
        except BaseException:
            self.close()
            raise

    def _open(self, part: Part, rows: int) -> None:
        path = self.path(part.name)
        try:
            descriptor = _descriptor(path)
        except OSError as error:
            remedy = _RESTORE
            if error.errno == errno.EMFILE:
                remedy = "a checkpoint is open as a whole, about five files for each table: raise the limit, ulimit -n"
            raise CheckpointError(f"{path}: {error.strerror}; {remedy}") from None
        self._descriptors[part.name] = descriptor
        size, expected = os.fstat(descriptor).st_size, rows * part.row_bytes
        if size != expected:
            raise CheckpointError(
                f"{path}, offset {min(size, expected)}: {size} bytes, but the manifest says {expected} "
                f"({rows} rows of {part.row_bytes}); {_RESTORE}"
            )

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def rows(self) -> int:
        return self.record.rows

    @property
    def piece_rows(self) -> int:
        """Rows that are read at a time."""
        return max(1, PIECE_BYTES // self.record.schema.row_bytes)

    def path(self, part: str) -> Path:
        return self.folder / self.collection / file_name(self.table, part)

    def read_part(self, part: str, first: int, stop: int) -> np.ndarray:
        """Rows ``first`` to ``stop`` (exclusive) of one file. Nothing is checked but that they are there."""
        layout = self._parts[part]
        array = layout.empty(stop - first)
        view = array.reshape(-1).view(np.uint8).data
        offset, done = first * layout.row_bytes, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptors[part], [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path(part)}, offset {offset + done}: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path(part)}, offset {offset + done}: the file ends here; {_RESTORE}")
            done += count
        return array

    def read(self, first: int, stop: int) -> Rows:
        """Rows ``first`` to ``stop`` (exclusive), every part of them. Neither checksums nor order are checked."""
        return Rows({part.name: self.read_part(part.name, first, stop) for part in self.record.schema.parts})

    def position(self, mixed: int, part: str = KEYS) -> int:
        """Number of rows whose mixed key is below ``mixed`` (0 to 2**64): where a range of keys begins.

        A binary search: reads about 30 keys of a file of any size.
        """
        first, stop = 0, self.record.parts[part].rows
        while first < stop:
            middle = (first + stop) // 2
            if int(mixed_keys(self.read_part(part, middle, middle + 1))[0]) < mixed:
                first = middle + 1
            else:
                stop = middle
        return first

    def find(self, key: int) -> Optional[int]:
        """The row of ``key``, or None. ``key`` is any int64."""
        mixed = int(mixed_keys(np.array([key], np.int64))[0])
        row = self.position(mixed)
        if row < self.rows and int(self.read_part(KEYS, row, row + 1)[0]) == key:
            return row
        return None

    def scan(self, first: int = 0, stop: Optional[int] = None) -> Scan:
        """A pass over rows ``first`` to ``stop`` (exclusive; default: all) that checks what it reads."""
        return Scan(self, first, self.rows if stop is None else stop)

    def check_spans(self, spans: Mapping[str, Iterable[Span]]) -> list[Problem]:
        """What is wrong with files whose spans, of all ranks that read them, are ``spans`` by part."""
        problems = []
        for name, part_spans in spans.items():
            part, entry, size = self._parts[name], self.record.parts[name], self.record.segment_rows
            sums = crc_of_segments(part_spans, entry.rows, part.row_bytes, size)
            for segment, (found, expected) in enumerate(zip(sums, entry.crc32, strict=True)):
                if found != expected:
                    message = f"segment {segment} has the CRC-32 {found:08x}, but the manifest says {expected:08x}"
                    problems.append(Problem(self.path(name), segment * size * part.row_bytes, message))
        return problems

    def evicted(self) -> Iterator[np.ndarray]:
        """Keys that a delta says have gone, int64, in pieces, in ascending order of the mixed key; unchecked."""
        for first in range(0, self.record.evicted_rows, PIECE_BYTES // EVICTED_PART.row_bytes):
            stop = min(first + PIECE_BYTES // EVICTED_PART.row_bytes, self.record.evicted_rows)
            yield self.read_part(EVICTED, first, stop)


class Scan:
    """One pass over consecutive rows, in pieces, each byte read once.

    Iterating raises :class:`~dynamicemb.errors.CheckpointError` where keys are not in strictly ascending order, which
    also finds duplicates. When it has ended, :attr:`spans` holds the checksums of what it read.
    """

    def __init__(self, table: StoredTable, first: int, stop: int) -> None:
        self.table, self.first, self.stop = table, first, stop
        size = table.record.segment_rows
        self._sums = {part.name: SpanSums(first, part.row_bytes, size) for part in table.record.schema.parts}

    def __iter__(self) -> Iterator[Piece]:
        step = self.table.piece_rows
        last = None
        if self.first > 0:  # the row before belongs to another range, whose order with this one is checked here
            last = self.table.read_part(KEYS, self.first - 1, self.first)
        for first in range(self.first, self.stop, step):
            rows = self.table.read(first, min(first + step, self.stop))
            for name, sums in self._sums.items():
                sums.add(rows.arrays[name])
            mixed = mixed_keys(rows.keys)
            check_order(self.table.path(KEYS), first, rows.keys, mixed, last)
            last = rows.keys[-1:]
            yield Piece(rows, mixed)

    @property
    def spans(self) -> dict[str, list[Span]]:
        return {name: sums.spans() for name, sums in self._sums.items()}


def check_order(path: Path, first: int, keys: np.ndarray, mixed: np.ndarray, last: Optional[np.ndarray]) -> None:
    """Raises unless ``mixed``, of rows from ``first`` on, ascends strictly, also from the key ``last`` before it."""
    if last is not None:
        keys, mixed, first = np.concatenate([last, keys]), np.concatenate([mixed_keys(last), mixed]), first - 1
    wrong = np.flatnonzero(mixed[1:] <= mixed[:-1])
    if wrong.size:
        row = int(wrong[0])
        message = f"key {keys[row + 1]} follows key {keys[row]}, which its mixed key should not"
        if keys[row + 1] == keys[row]:
            message = f"key {keys[row]} occurs twice"
        raise CheckpointError(str(Problem(path, (first + row + 1) * 8, message)))


class Checkpoint:
    """A checkpoint, open for reading: a context manager that closes its files.

    Args:
        path: its folder.

    Raises:
        CheckpointError: there is no finished checkpoint, its manifest is damaged, or a file is missing or has another
            size than the manifest says.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = finished(local_path(path))
        self.manifest: Manifest = read_manifest(self.path)
        self.tables: dict[tuple[str, str], StoredTable] = {}
        try:
            for collection, tables in self.manifest.tables.items():
                for table, record in tables.items():
                    self.tables[collection, table] = StoredTable(self.path, collection, table, record)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for table in self.tables.values():
            table.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()

    def table(self, name: str) -> StoredTable:
        """The table called ``name`` (``<collection>/<name>`` where several collections have one).

        Raises:
            CheckpointError: there is no such table, or there are several.
        """
        return self.tables[named(self.tables, name, str(self.path))]


def named(tables: Iterable[tuple[str, str]], name: str, where: str) -> tuple[str, str]:
    """Which of ``tables``, (collection, name), is called ``name``; ``where`` they are is for the error.

    Raises:
        CheckpointError: there is no such table, or there are several.
    """
    paths = {table: "/".join(table) for table in tables}
    found = [table for table, path in paths.items() if name in (table[1], path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{where}: {len(found)} tables are called {name!r}; name one of {listed(paths[table] for table in found)}"
        )
    raise CheckpointError(f"{where}: no table is called {name!r}; the tables are {listed(paths.values())}")
