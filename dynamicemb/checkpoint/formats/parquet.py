"""One table in one Parquet file, in row groups of about 16 MiB: columns id, row, score, and opt_<state> for states.

Parquet has no bfloat16: such rows are written as float32, which is exact. The text ``dynamicemb`` of the schema's
metadata tells the rest of the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import PIECE_BYTES
from dynamicemb.checkpoint.files.schema import KEYS, SCORES, VALUES, Part, Rows, TableSchema, opt
from dynamicemb.checkpoint.formats.exchange import (
    NO_HINTS,
    Hints,
    as_dtype,
    as_float32,
    described,
    foreign_record,
    record_from,
    score_bounds,
)
from dynamicemb.errors import CheckpointError, ConfigError, DynamicEmbWarning

__all__ = ["ParquetSource", "ParquetTableWriter", "require_pyarrow"]

_OURS = b"dynamicemb"
_COLUMN_BY_PART = {KEYS: "id", VALUES: "row", SCORES: "score"}
_BUFFER_BYTES = 1 << 20
_RESTORE = "write the file again, or restore it from a copy"


def require_pyarrow() -> Any:
    """pyarrow with its Parquet module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Parquet files need pyarrow ({error}); install it: pip install 'dynamicemb[export]', or use safetensors"
        ) from error
    return pyarrow


def _column(part: Part) -> str:
    return _COLUMN_BY_PART.get(part.name, part.name)


class ParquetTableWriter:
    """Writes one table.

    Args:
        path: of the file; its folder exists.
        record: of the table.

    Raises:
        ConfigError: pyarrow is not installed.
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, record: TableRecord) -> None:
        self._arrow = require_pyarrow()
        self._path, self._record = path, record
        fields = [self._arrow.field(_column(part), self._type(part), nullable=False) for part in record.schema.parts]
        metadata = {_OURS: json.dumps(described(record)).encode()}
        self._schema = self._arrow.schema(fields, metadata=metadata)
        try:
            # Embeddings and ids hardly ever repeat, so dictionaries would only cost time.
            self._writer = self._arrow.parquet.ParquetWriter(path, self._schema, use_dictionary=False)
        except OSError as error:
            raise CheckpointError(f"{path}: {error}; choose another path") from error

    def _type(self, part: Part) -> Any:
        if part.width is None:
            return self._arrow.int64()
        element = self._arrow.float16() if part.dtype == "float16" else self._arrow.float32()
        return self._arrow.list_(self._arrow.field("element", element, nullable=False), part.width)

    def write(self, rows: Rows) -> None:
        """The rows that follow those written before, as a row group.

        Raises:
            CheckpointError: there is no room.
        """
        columns = []
        for part, field in zip(self._record.schema.parts, self._schema):
            array = rows.arrays[part.name]
            if part.dtype == "bfloat16":
                array = as_float32(array, part.dtype)
            column = self._arrow.array(np.ascontiguousarray(array).reshape(-1))
            if part.width is not None:
                column = self._arrow.FixedSizeListArray.from_arrays(column, type=field.type)
            columns.append(column)
        table = self._arrow.Table.from_arrays(columns, schema=self._schema)
        try:
            self._writer.write_table(table, row_group_size=max(1, len(rows)))
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error}; make room, or choose another path") from error

    def finish(self) -> None:
        """Writes the footer and waits until everything is on disk."""
        try:
            self._writer.close()
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error}; make room, or choose another path") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whose cause has been reported
            self._writer.close()


class ParquetSource:
    """The table in a Parquet file: columns ``id`` and ``row``, and what else there is of ours.

    Args:
        path: the file.
        collection, table: name that the table is to have.
        hints: what the user says; otherwise rows have the dtype of the file, or the one when dynamicemb wrote it.

    Raises:
        ConfigError: pyarrow is not installed.
        CheckpointError: the file is malformed, or its columns are not those of a table.
    """

    sorted = False

    def __init__(self, path: Path, collection: str, table: str, hints: Hints = NO_HINTS) -> None:
        self._arrow = require_pyarrow()
        self.path, self.collection, self.table = path, collection, table
        try:
            # Without a buffer size, a whole column of a row group is read at once, however large others made them.
            self._file = self._arrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (OSError, self._arrow.ArrowException) as error:
            raise CheckpointError(f"{path}: not a Parquet file ({error}); {_RESTORE}") from None
        try:
            self.rows = self._file.metadata.num_rows
            self._schema = self._file.schema_arrow
            self.record = self._read_record(hints)
        except BaseException:
            self.close()
            raise

    def _read_record(self, hints: Hints) -> TableRecord:
        arrow = self._arrow.types
        self._require("id", lambda kind: arrow.is_int64(kind) or arrow.is_int32(kind) or arrow.is_uint64(kind), "int64")
        stored, dim = self._list("row", ("float", "halffloat"))
        if "score" in self._schema.names:
            self._require("score", arrow.is_int64, "int64")
        metadata = self._schema.metadata or {}
        if _OURS in metadata:
            return self._own_record(metadata[_OURS].decode(errors="replace"), dim, hints.dtype)
        self._warn_of_others({"id", "row", "score"})
        clock = 0
        if "score" in self._schema.names:
            bounds = score_bounds(batch["score"] for batch in self._batches(["score"], 8))
            clock = max(0, bounds[1]) if bounds else 0
        return foreign_record(
            TableSchema(dim, hints.dtype or stored), clock=clock, evict_strategy=hints.evict_strategy or "lru"
        )

    def _own_record(self, text: str, dim: int, dtype: Optional[str]) -> TableRecord:
        ours = record_from(self.path, f"metadata {_OURS.decode()!r}", text)
        if ours.schema.dim != dim:
            raise CheckpointError(
                f"{self.path}: rows of {dim} values, but its metadata says {ours.schema.dim}; {_RESTORE}"
            )
        for name, width in ours.schema.states:
            if self._list(opt(name), ("float",))[1] != width:
                raise CheckpointError(f"{self.path}: column {opt(name)!r} is not as wide as {width}; {_RESTORE}")
        self._require("score", self._arrow.types.is_int64, "int64")
        self._warn_of_others({"id", "row", "score", *(opt(name) for name, _ in ours.schema.states)})
        return dataclasses.replace(ours, schema=TableSchema(dim, dtype or ours.schema.dtype, ours.schema.states))

    def _require(self, name: str, is_right: Any, described_type: str) -> Any:
        if name not in self._schema.names:
            here = ", ".join(self._schema.names) or "none"
            raise CheckpointError(
                f"{self.path}: no column {name!r} (there are: {here}); a table has 'id' (int64) and 'row' (a list)"
            )
        kind = self._schema.field(name).type
        if not is_right(kind):
            raise CheckpointError(f"{self.path}: column {name!r} is {kind}, not {described_type}; write it so")
        return kind

    def _list(self, name: str, elements: tuple[str, ...]) -> tuple[str, int]:
        """Dtype and width of a column of lists that are all equally long."""
        arrow = self._arrow.types
        kind = self._require(
            name,
            lambda kind: (
                (arrow.is_fixed_size_list(kind) or arrow.is_list(kind) or arrow.is_large_list(kind))
                and str(kind.value_type) in elements
            ),
            f"a list of {' or '.join(elements)}",
        )
        if arrow.is_fixed_size_list(kind):
            width = kind.list_size
        else:
            first = next(self._raw_batches([name], 1), None)
            width = 0 if first is None or first.num_rows == 0 else len(first.column(0)[0].as_py() or ())
        if width < 1:
            raise CheckpointError(f"{self.path}: the width of column {name!r} cannot be told, or is 0; {_RESTORE}")
        return ("float16" if str(kind.value_type) == "halffloat" else "float32"), width

    def _warn_of_others(self, known: set[str]) -> None:
        if others := [name for name in self._schema.names if name not in known]:
            warnings.warn(
                f"{self.path}: columns {', '.join(others)} are left out: they are no part of a table, or the state of "
                "an optimizer that the file does not name",
                DynamicEmbWarning,
                stacklevel=2,
            )

    def _raw_batches(self, columns: list[str], rows: int) -> Iterator[Any]:
        try:
            yield from self._file.iter_batches(batch_size=rows, columns=columns, use_threads=False)
        except (OSError, self._arrow.ArrowException) as error:
            raise CheckpointError(f"{self.path}: {error}; {_RESTORE}") from None

    def _batches(self, columns: list[str], row_bytes: int) -> Iterator[dict[str, np.ndarray]]:
        first = 0
        for batch in self._raw_batches(columns, max(1, PIECE_BYTES // row_bytes)):
            yield {name: self._array(name, batch.column(name), first) for name in columns}
            first += batch.num_rows

    def _array(self, name: str, column: Any, first: int) -> np.ndarray:
        """A column as an array; lists become its rows."""
        nulls = column.null_count
        flat, rows = column, len(column)
        if hasattr(column, "flatten") and not self._arrow.types.is_integer(column.type):
            flat = column.flatten()
            nulls += flat.null_count
            fixed = self._arrow.types.is_fixed_size_list(column.type)
            lengths = np.array([]) if fixed or nulls else column.value_lengths().to_numpy(zero_copy_only=False)
            if rows and (lengths != len(flat) // rows).any():
                row = first + int(np.flatnonzero(lengths != lengths[0])[0])
                raise CheckpointError(
                    f"{self.path}: row {row} of column {name!r} is not as long as the others; {_RESTORE}"
                )
        if nulls:
            raise CheckpointError(f"{self.path}: column {name!r} has a null after row {first}; leave such rows out")
        array = flat.to_numpy(zero_copy_only=False)
        return array if flat is column else array.reshape(rows, -1)

    def pieces(self) -> Iterator[Rows]:
        schema = self.record.schema
        parts = {part.name: _column(part) for part in schema.parts if _column(part) in self._schema.names}
        for batch in self._batches(list(parts.values()), schema.row_bytes):
            keys = batch["id"]
            arrays = {name: batch[column] for name, column in parts.items()}
            arrays[KEYS] = keys.view("<i8") if keys.dtype == np.uint64 else keys.astype("<i8", copy=False)
            arrays.setdefault(SCORES, np.zeros(keys.size, "<i8"))
            arrays[VALUES] = self._values(arrays[VALUES])
            for name, width in schema.states:
                self._check_width(opt(name), arrays[opt(name)], width)
            yield Rows(arrays)

    def _values(self, values: np.ndarray) -> np.ndarray:
        self._check_width("row", values, self.record.schema.dim)
        wanted = self.record.schema.dtype
        if values.dtype == np.float16 and wanted == "float16":
            return values
        return as_dtype(values.astype("<f4", copy=False), wanted)

    def _check_width(self, column: str, array: np.ndarray, width: int) -> None:
        if array.shape[1] != width:
            raise CheckpointError(
                f"{self.path}: column {column!r} has lists of {array.shape[1]} and of {width} values; {_RESTORE}"
            )

    def places(self, key: int) -> list[str]:
        found, first = [], 0
        for batch in self._batches(["id"], 8):
            keys = batch["id"]
            wanted = np.uint64(key % 2**64) if keys.dtype == np.uint64 else key
            found += [f"{self.path}, row {first + row}" for row in np.flatnonzero(keys == wanted)]
            first += keys.size
        return found

    def close(self) -> None:
        self._file.close()
