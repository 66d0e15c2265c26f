"""Criteo click logs on disk: Parquet with columns label, i1..i13, c1..c26, or the tab-separated layout of the original.

Both are checked as they are decoded. Every error is a ``DataError`` that names the file and, where there is one, the
row (counted from 1 in its file).
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from rows import CATEGORICAL, DENSE, LABEL, Chunk, Rows, RowSource

from dynamicemb.errors import DataError

COLUMNS = (LABEL, *DENSE, *CATEGORICAL)
SUFFIXES = (".parquet", ".tsv", ".txt")
#: Rows of a tab-separated file that are decoded together: large enough to be fast, about 5 MB in memory.
TSV_CHUNK_ROWS = 16_384
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]{1,16}")


def open_files(paths: Sequence[Path]) -> RowSource:
    """The rows of ``paths`` in the order given; of a folder, its files with a known suffix in the order of their names.

    Reads no rows yet, only Parquet footers and the line ends of tab-separated files.

    Raises:
        DataError: a path does not exist, a folder holds no such file, a file cannot be read or lacks a column, or there
            is no row at all.
    """
    chunks: list[Chunk] = []
    for path in paths:
        for file in _files(path):
            try:
                chunks.extend(_parquet_chunks(file) if _is_parquet(file) else _tsv_chunks(file))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file}: cannot be read: {error}") from error
    source = RowSource(chunks)
    if source.num_rows == 0:
        raise DataError(f"{', '.join(map(str, paths))}: no rows; give files with at least one")
    return source


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this folder; name the files themselves")
    return files


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as stream:
        return file.suffix == ".parquet" or stream.read(4) == b"PAR1"


def _parquet_chunks(file: Path) -> Iterator[Chunk]:
    """One chunk for each row group."""
    metadata = pq.read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    missing = [column for column in COLUMNS if column not in schema.names]
    if missing:
        raise DataError(f"{file}: no column {', '.join(missing)}; a Criteo file has label, i1 to i13 and c1 to c26")
    for column in COLUMNS:
        kind = schema.field(column).type
        number = pa.types.is_integer(kind) or (column not in CATEGORICAL and pa.types.is_floating(kind))
        if not number:
            expected = "an integer" if column in CATEGORICAL else "a number"
            raise DataError(f"{file}: column {column} has type {kind}; it must be {expected}")
    first_row = 1
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        yield Chunk(num_rows, functools.partial(_load_parquet, file, group, first_row))
        first_row += num_rows


def _load_parquet(file: Path, group: int, first_row: int) -> Rows:
    try:
        table = pq.ParquetFile(file).read_row_group(group, columns=list(COLUMNS), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: row group {group}, from row {first_row} on, cannot be read: {error}") from error
    return _rows(file, first_row, {column: table[column].combine_chunks() for column in COLUMNS})


def _tsv_chunks(file: Path) -> Iterator[Chunk]:
    """Chunks of TSV_CHUNK_ROWS lines, found by one pass over the line ends."""
    offset, first_row, lines = 0, 1, 0
    position, last_byte = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            for end in (np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1 + position).tolist():
                lines += 1
                if lines == TSV_CHUNK_ROWS:
                    yield Chunk(lines, functools.partial(_load_tsv, file, offset, end, first_row))
                    offset, first_row, lines = end, first_row + lines, 0
            position += len(block)
            last_byte = block[-1:]
    lines += last_byte != b"\n"
    if lines:
        yield Chunk(lines, functools.partial(_load_tsv, file, offset, position, first_row))


def _load_tsv(file: Path, start: int, stop: int, first_row: int) -> Rows:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            block = stream.read(stop - start)
    except OSError as error:
        raise DataError(f"{file}: from row {first_row} on, cannot be read: {error}") from error
    if not block.isascii():
        line = next(number for number, line in enumerate(block.split(b"\n")) if not line.isascii())
        raise DataError(f"{file}: row {first_row + line} is not plain text")
    table = _tsv_columns(file, block, first_row)
    return _rows(file, first_row, {name: _parsed(file, first_row, name, table[name]) for name in COLUMNS})


def _tsv_columns(file: Path, block: bytes, first_row: int) -> dict[str, pa.Array]:
    """The fields of ``block`` as text, null where they are empty."""

    wrong: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:  # an exception would not leave the parser
        wrong.append(row)
        return "error"

    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=list(COLUMNS))
    parsing = pyarrow.csv.ParseOptions(
        delimiter="\t", quote_char=False, ignore_empty_lines=False, invalid_row_handler=note
    )
    converting = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(COLUMNS, pa.string()), null_values=[""], strings_can_be_null=True
    )
    try:
        table = pyarrow.csv.read_csv(io.BytesIO(block), reading, parsing, converting)
    except pa.ArrowInvalid as error:
        if not wrong:
            raise DataError(f"{file}: from row {first_row} on: {error}") from error
        raise DataError(
            f"{file}: row {first_row + wrong[0].number - 1} has {wrong[0].actual_columns} fields; a Criteo row has "
            f"{len(COLUMNS)}, separated by tabs"
        ) from error
    return {column: table[column].combine_chunks() for column in COLUMNS}


def _parsed(file: Path, first_row: int, column: str, text: pa.Array) -> pa.Array:
    """Text as numbers. Each distinct text of a categorical column is parsed once: they repeat."""
    if column not in CATEGORICAL:
        try:
            return pc.cast(text, pa.float32())
        except pa.ArrowInvalid:
            row = next(row for row, field in enumerate(text.to_pylist()) if not _is_number(field))
            _reject(file, first_row + row, column, text[row].as_py(), "a number")
    encoded = text.dictionary_encode()
    ids = np.empty(len(encoded.dictionary), np.uint64)
    for code, field in enumerate(encoded.dictionary.to_pylist()):
        if not _HEXADECIMAL.fullmatch(field):
            row = pc.index(text, field).as_py()
            _reject(file, first_row + row, column, field, "a hexadecimal number of at most 16 digits")
        ids[code] = int(field, 16)
    return pa.array(ids.view(np.int64)).take(encoded.indices)


def _is_number(field: str | None) -> bool:
    try:
        float(field or 0)
    except ValueError:
        return False
    return True


def _rows(file: Path, first_row: int, columns: dict[str, pa.Array]) -> Rows:
    """Checked tensors of decoded columns; integers of any width are accepted, uint64 ids as their 64 bits."""

    def floats(name: str) -> np.ndarray:
        return pc.cast(columns[name], pa.float32(), safe=False).fill_null(float("nan")).to_numpy(zero_copy_only=False)

    labels = floats(LABEL)
    for row in np.flatnonzero((labels != 0) & (labels != 1))[:1]:
        _reject(file, first_row + row, LABEL, columns[LABEL][row].as_py(), "0 or 1")
    dense = np.empty((len(labels), len(DENSE)), np.float32)
    ids = np.empty((len(labels), len(CATEGORICAL)), np.int64)
    present = np.empty((len(labels), len(CATEGORICAL)), np.bool_)
    for index, name in enumerate(DENSE):
        counts = floats(name)
        valid = columns[name].is_valid().to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(valid & ~np.isfinite(counts))[:1]:
            _reject(file, first_row + row, name, columns[name][row].as_py(), "a finite number")
        dense[:, index] = np.where(valid, counts, 0)
    for index, name in enumerate(CATEGORICAL):
        column = pc.cast(columns[name], pa.int64(), safe=False)
        ids[:, index] = column.fill_null(0).to_numpy(zero_copy_only=False)
        present[:, index] = column.is_valid().to_numpy(zero_copy_only=False)
    return Rows(*map(torch.from_numpy, (labels.copy(), dense, ids, present)))


def _reject(file: Path, row: int, column: str, value: object, expected: str) -> NoReturn:
    shown = "nothing" if value is None else repr(value)
    raise DataError(f"{file}: row {row}: column {column} holds {shown}; it must be {expected}")
