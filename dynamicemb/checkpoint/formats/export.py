"""Writes tables as files of other formats, and finds the tables in such files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, Union

from dynamicemb.checkpoint.files.reader import Piece
from dynamicemb.checkpoint.files.schema import Rows
from dynamicemb.checkpoint.formats.exchange import Hints, Source
from dynamicemb.checkpoint.formats.nvidia import NvidiaTableWriter
from dynamicemb.checkpoint.formats.parquet import ParquetSource, ParquetTableWriter, require_pyarrow
from dynamicemb.checkpoint.formats.safetensors import SafetensorsSource, SafetensorsTableWriter
from dynamicemb.errors import CheckpointError

__all__ = ["EXPORTS", "export_table", "file_source", "prepare"]

#: Formats of one file for each table, which is called ``<collection>/<table>.<format>``.
EXPORTS = ("parquet", "safetensors")


class _TableWriter(Protocol):
    def write(self, rows: Rows) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


def prepare(to: str) -> None:
    """Raises ConfigError if a library is missing that ``to`` needs."""
    if to == "parquet":
        require_pyarrow()


def export_table(folder: Path, source: Source, pieces: Iterable[Piece], to: str, world_size: int) -> Iterator[int]:
    """Writes one table below ``folder``; yields the number of rows of each piece after it was written.

    Args:
        folder: of the export; made if needed.
        source: the table.
        pieces: its rows, in the order in which they are to be written.
        to: ``nvidia``, ``parquet`` or ``safetensors``.
        world_size: ranks of an NVIDIA dump.

    Raises:
        CheckpointError: there is no room, or files cannot be written.
    """
    collection = folder / source.collection
    try:
        collection.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{collection}: {error.strerror}; choose another path") from error
    writer = _writer(collection, source, to, world_size)
    try:
        for piece in pieces:
            writer.write(piece.rows)
            yield len(piece.rows)
        writer.finish()
    finally:
        writer.close()


def _writer(collection: Path, source: Source, to: str, world_size: int) -> _TableWriter:
    if to == "nvidia":
        return NvidiaTableWriter(collection, source.table, source.record, world_size)
    path = collection / f"{source.table}.{to}"
    if to == "parquet":
        return ParquetTableWriter(path, source.record)
    return SafetensorsTableWriter(path, source.record, source.rows)


def file_source(path: Path, collection: str, hints: Hints) -> Union[ParquetSource, SafetensorsSource]:
    """The table in a Parquet or safetensors file, by the ending of its name."""
    if path.suffix == ".parquet":
        return ParquetSource(path, collection, path.stem, hints)
    return SafetensorsSource(path, collection, path.stem, hints)
