"""Rows in any order, brought into the order of a checkpoint: an external sort in bounded memory.

Rows are dealt out to temporary files by the first bits of their mixed keys, until what has the same bits fits in memory
and is sorted there. Mixed keys of different keys differ and are spread evenly, so a table of 256 GiB takes two passes
over the disk, and one that fits in a piece takes none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynamicemb.checkpoint.files.reader import PIECE_BYTES, Piece
from dynamicemb.checkpoint.files.schema import KEYS, Rows, TableSchema, mixed_keys
from dynamicemb.checkpoint.formats.exchange import Source
from dynamicemb.errors import CheckpointError

__all__ = ["DuplicateKey", "ordered", "sorted_pieces"]

#: Temporary files of one pass: few enough for any limit on open files.
_MAX_BITS = 7
_KEY_BITS = 64


class DuplicateKey(Exception):  # noqa: N818 - not an error of the user's yet: whoever knows the files makes it one
    """A key that occurs more than once."""

    def __init__(self, key: int) -> None:
        super().__init__(key)
        self.key = key


def ordered(source: Source, folder: Path, read: Callable[[int], None]) -> Iterator[Piece]:
    """The rows of ``source`` in ascending order of their mixed keys, each key once.

    Args:
        source: where they come from.
        folder: for temporary files, made if needed and removed at the end; it may need as much room as the rows do.
        read: called with the number of rows of every piece that has been read from ``source``.

    Raises:
        CheckpointError: rows cannot be read, a key occurs twice, or there is no room for temporary files.
    """
    pieces = _counted(source.pieces(), read)
    if source.sorted:
        for rows in pieces:
            yield Piece(rows, mixed_keys(rows.keys))
        return
    try:
        yield from sorted_pieces(pieces, source.record.schema, source.rows, folder)
    except DuplicateKey as duplicate:
        places = " and at ".join(source.places(duplicate.key)[:2])
        raise CheckpointError(
            f"{source.collection}/{source.table}: key {duplicate.key} occurs more than once, at {places}; "
            "a table has each key once: remove all but one of its rows, or dump the table again"
        ) from None


def _counted(pieces: Iterable[Rows], read: Callable[[int], None]) -> Iterator[Rows]:
    for rows in pieces:
        read(len(rows))
        yield rows


def sorted_pieces(
    pieces: Iterable[Rows], schema: TableSchema, rows: int, folder: Path, piece_bytes: int = PIECE_BYTES
) -> Iterator[Piece]:
    """``pieces`` of any order as pieces in ascending order of the mixed key.

    Args:
        pieces: rows with the parts of ``schema``.
        schema: what a row has.
        rows: how many rows there are in all.
        folder: for temporary files; made if needed, removed at the end.
        piece_bytes: about what a piece may have, and a fraction of the memory that is used.

    Raises:
        DuplicateKey: a key occurs twice.
        CheckpointError: there is no room for the temporary files.
    """
    sorter = _Sorter(schema, piece_bytes)
    try:
        yield from sorter.sorted((sorter.records(rows) for rows in pieces), rows, 0, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Sorter:
    def __init__(self, schema: TableSchema, piece_bytes: int) -> None:
        self._names = [part.name for part in schema.parts]
        self._record: np.dtype[Any] = np.dtype(
            [(part.name, part.empty(0).dtype, () if part.width is None else (part.width,)) for part in schema.parts]
        )
        self._piece_rows = max(1, piece_bytes // self._record.itemsize)

    def records(self, rows: Rows) -> np.ndarray:
        """Rows with all parts of a row side by side, so that it is moved as one."""
        records = np.empty(len(rows), self._record)
        for name in self._names:
            records[name] = rows.arrays[name]
        return records

    def sorted(self, pieces: Iterable[np.ndarray], rows: int, known_bits: int, folder: Path) -> Iterator[Piece]:
        """Sorts ``rows`` records whose mixed keys have the first ``known_bits`` bits in common."""
        if rows <= self._piece_rows:
            if rows:
                yield self._sorted_run(np.concatenate(list(pieces)))
            return
        if known_bits == _KEY_BITS:
            raise DuplicateKey(int(next(iter(pieces))[KEYS][0]))
        # One bit more than the average needs: half-filled partitions, so that hardly any is too large by chance.
        needed = (rows // self._piece_rows).bit_length() + 1
        bits = min(needed, _MAX_BITS, _KEY_BITS - known_bits)
        counts = self._deal_out(pieces, known_bits, bits, folder)
        for number, count in enumerate(counts):
            path = _partition(folder, number)
            yield from self.sorted(self._read(path), count, known_bits + bits, folder / f"{number:02x}.parts")
            path.unlink(missing_ok=True)

    def _sorted_run(self, records: np.ndarray) -> Piece:
        mixed = mixed_keys(records[KEYS])
        order = np.argsort(mixed)
        mixed = mixed[order]
        equal = np.flatnonzero(mixed[1:] == mixed[:-1])
        if equal.size:
            raise DuplicateKey(int(records[KEYS][order[equal[0]]]))
        return Piece(Rows({name: records[name][order] for name in self._names}), mixed)

    def _deal_out(self, pieces: Iterable[np.ndarray], known_bits: int, bits: int, folder: Path) -> list[int]:
        """Appends every record to the file of the ``bits`` bits after the known ones; returns records by file."""
        counts = np.zeros(1 << bits, np.int64)
        files: dict[int, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for records in pieces:
                mixed = mixed_keys(records[KEYS])
                numbers = ((mixed << np.uint64(known_bits)) >> np.uint64(_KEY_BITS - bits)).astype(np.uint8)
                ends = np.cumsum(np.bincount(numbers, minlength=1 << bits))
                records = records[np.argsort(numbers, kind="stable")]
                for number in np.unique(numbers).tolist():
                    if number not in files:
                        files[number] = open(_partition(folder, number), "wb", buffering=0)  # noqa: SIM115
                    first = 0 if number == 0 else int(ends[number - 1])
                    _write(files[number], records[first : int(ends[number])])
                counts += np.diff(ends, prepend=0)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: {error.strerror}; sorting needs as much room there as the table takes: make room, "
                "or choose another path"
            ) from error
        finally:
            for file in files.values():
                file.close()
        return counts.tolist()

    def _read(self, path: Path) -> Iterator[np.ndarray]:
        with open(path, "rb") as file:
            while (records := np.fromfile(file, self._record, self._piece_rows)).size:
                yield records


def _partition(folder: Path, number: int) -> Path:
    return folder / f"{number:02x}"


def _write(file: Any, records: np.ndarray) -> None:
    view, done = records.view(np.uint8).data, 0
    while done < len(view):
        done += os.write(file.fileno(), view[done:])
