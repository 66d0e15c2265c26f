"""One table in one safetensors file: written and read to the published format, in pieces.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces to 8 bytes), then the
tensors one after the other, without gaps: ``ids`` I64 [N], ``scores`` I64 [N], ``opt_<state>`` F32 [N, width], ``rows``
F32, F16 or BF16 [N, dim]. The text ``dynamicemb`` of the header's metadata tells the rest of the table.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import PIECE_BYTES
from dynamicemb.checkpoint.files.schema import DTYPES, KEYS, SCORES, VALUES, Part, Rows, TableSchema, opt
from dynamicemb.checkpoint.formats.exchange import (
    NO_HINTS,
    Hints,
    as_dtype,
    as_float32,
    foreign_record,
    read_array,
    record_from,
    score_bounds,
)
from dynamicemb.checkpoint.formats.exchange import described as description_of
from dynamicemb.errors import CheckpointError, DynamicEmbWarning

__all__ = ["SafetensorsSource", "SafetensorsTableWriter"]

_METADATA, _OURS = "__metadata__", "dynamicemb"
_NAME_BY_PART = {KEYS: "ids", VALUES: "rows", SCORES: "scores"}
_CODE = {"int64": "I64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPE = {code: dtype for dtype, code in _CODE.items()}
#: The library's own limit.
_MAX_HEADER_BYTES = 100_000_000
_RESTORE = "write the file again, or restore it from a copy"


def _name(part: Part) -> str:
    return _NAME_BY_PART.get(part.name, part.name)


class SafetensorsTableWriter:
    """Writes one table of a known number of rows.

    Args:
        path: of the file; its folder exists.
        record: of the table.
        rows: how many will be written.

    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, record: TableRecord, rows: int) -> None:
        self._path, self._next = path, 0
        # The widest dtype first, so that every tensor begins at a multiple of its size.
        parts = sorted(record.schema.parts, key=lambda part: -DTYPES[part.dtype].itemsize)
        header: dict[str, Any] = {_METADATA: {"format": "pt", _OURS: json.dumps(description_of(record))}}
        offset = 0
        for part in parts:
            end = offset + rows * part.row_bytes
            header[_name(part)] = {
                "dtype": _CODE[part.dtype],
                "shape": list(part.shape(rows)),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._parts = [(part, self._data + header[_name(part)]["data_offsets"][0]) for part in parts]
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; choose another path") from error
        self._write(0, len(text).to_bytes(8, "little") + text)
        if offset == 0:
            return
        try:
            os.ftruncate(self._descriptor, self._data + offset)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; make room, or choose another path") from error

    def write(self, rows: Rows) -> None:
        """The rows that follow those written before.

        Raises:
            CheckpointError: there is no room.
        """
        for part, offset in self._parts:
            array = np.ascontiguousarray(rows.arrays[part.name])
            self._write(offset + self._next * part.row_bytes, array.reshape(-1).view(np.uint8).data)
        self._next += len(rows)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"{self._path}, offset {offset + done}: {error.strerror}; make room, or choose another path"
            ) from error

    def finish(self) -> None:
        """Waits until everything is on disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error.strerror}; make room, or choose another path") from error

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _read_header(path: Path) -> tuple[dict[str, _Tensor], dict[str, Any]]:
    """Tensors by name, their offsets counted from the file's start, and the metadata; everything is checked."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if size < 8:
        raise CheckpointError(f"{path}, offset {size}: {size} bytes are no safetensors file; {_RESTORE}")
    length = int(read_array(path, 0, "<u8", (1,))[0])
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}, offset 0: a header of {length} bytes, but the file has {size} and {_MAX_HEADER_BYTES} are the "
            f"most; {_RESTORE}"
        )
    try:
        header = json.loads(read_array(path, 8, "u1", (length,)).tobytes().decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}, offset 8: the header is not JSON ({error}); {_RESTORE}") from None
    if not isinstance(header, dict) or not isinstance(header.get(_METADATA, {}), dict):
        raise CheckpointError(f"{path}, offset 8: the header is not an object; {_RESTORE}")
    metadata = header.pop(_METADATA, {})
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    return tensors, metadata


def _tensor(path: Path, name: str, entry: object, data: int, size: int) -> _Tensor:
    error = f"{path}, offset 8: tensor {name!r}: "
    if not isinstance(entry, dict):
        raise CheckpointError(f"{error}not an object; {_RESTORE}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            raise CheckpointError(f"{error}{numbers!r} is no list of sizes; {_RESTORE}")
    assert isinstance(shape, list) and isinstance(offsets, list)
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
        raise CheckpointError(f"{error}data_offsets {offsets} lie outside the {size - data} bytes of data; {_RESTORE}")
    dtype = _DTYPE.get(str(entry.get("dtype")), "")
    num_bytes = offsets[1] - offsets[0]
    if dtype and num_bytes != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"{error}{num_bytes} bytes are not those of {entry['dtype']} {shape}; {_RESTORE}")
    return _Tensor(dtype, tuple(shape), data + offsets[0])


class SafetensorsSource:
    """The table in a safetensors file: tensors ``ids`` and ``rows``, and what else there is of ours.

    Args:
        path: the file.
        collection, table: name that the table is to have.
        hints: what the user says; otherwise rows have the dtype of the file.

    Raises:
        CheckpointError: the file is malformed, or its tensors are not those of a table.
    """

    sorted = False

    def __init__(self, path: Path, collection: str, table: str, hints: Hints = NO_HINTS) -> None:
        self.path, self.collection, self.table = path, collection, table
        self._tensors, metadata = _read_header(path)
        ids, rows = self._require("ids", ("int64",), 1), self._require("rows", ("float32", "float16", "bfloat16"), 2)
        self.rows = ids.shape[0]
        if rows.shape[1] == 0:
            raise CheckpointError(f"{path}: tensor 'rows' has no columns; {_RESTORE}")
        states = [name for name in self._tensors if name.startswith("opt_")]
        widths = tuple((name.removeprefix("opt_"), self._require(name, ("float32",), 2).shape[1]) for name in states)
        if "scores" in self._tensors:
            self._require("scores", ("int64",), 1)
        self._check_counts()
        self.record = self._record(metadata, rows.shape[1], rows.dtype, widths, hints)

    def _require(self, name: str, dtypes: tuple[str, ...], dimensions: int) -> _Tensor:
        if name not in self._tensors:
            here = ", ".join(sorted(self._tensors)) or "none"
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} (there are: {here}); a table has 'ids' [N] and 'rows' [N, dim]"
            )
        tensor = self._tensors[name]
        if tensor.dtype not in dtypes or len(tensor.shape) != dimensions:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} is not of "
                f"{' or '.join(_CODE[dtype] for dtype in dtypes)} with {dimensions} dimension(s); write it so"
            )
        return tensor

    def _check_counts(self) -> None:
        for name in self._names():
            if (count := self._tensors[name].shape[0]) != self.rows:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has {count} rows, but 'ids' {self.rows}; {_RESTORE}"
                )

    def _names(self) -> list[str]:
        return [name for name in self._tensors if name in ("ids", "rows", "scores") or name.startswith("opt_")]

    def _record(
        self, metadata: dict[str, Any], dim: int, stored: str, states: tuple[tuple[str, int], ...], hints: Hints
    ) -> TableRecord:
        self._warn_of_others(states if _OURS not in metadata else ())
        dtype, strategy = hints.dtype or stored, hints.evict_strategy
        if _OURS not in metadata:
            bounds = score_bounds(rows.scores for rows in self._pieces(()))
            clock = max(0, bounds[1]) if bounds else 0
            return foreign_record(TableSchema(dim, dtype), clock=clock, evict_strategy=strategy or "lru")
        ours = record_from(self.path, f"metadata {_OURS!r}", metadata[_OURS])
        expected = dict(ours.schema.states)
        if dict(states) != expected:
            raise CheckpointError(
                f"{self.path}: optimizer states {dict(states)}, but its metadata says {expected}; {_RESTORE}"
            )
        return dataclasses.replace(ours, schema=TableSchema(dim, dtype, ours.schema.states))

    def _warn_of_others(self, states: tuple[tuple[str, int], ...]) -> None:
        others = [name for name in self._tensors if name not in self._names()] + [opt(name) for name, _ in states]
        if others:
            warnings.warn(
                f"{self.path}: tensors {', '.join(sorted(others))} are left out: they are no part of a table, or the "
                "state of an optimizer that the file does not name",
                DynamicEmbWarning,
                stacklevel=2,
            )

    def pieces(self) -> Iterator[Rows]:
        yield from self._pieces(tuple(name for name, _ in self.record.schema.states), values=True)

    def _pieces(self, states: tuple[str, ...], values: bool = False) -> Iterator[Rows]:
        names = {KEYS: "ids", SCORES: "scores", **{opt(state): opt(state) for state in states}}
        if values:
            names[VALUES] = "rows"
        row_bytes = sum(self._row_bytes(name) for name in names.values())
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, self.rows, step):
            count = min(step, self.rows - first)
            arrays = {part: self._read(name, first, count) for part, name in names.items()}
            if values:
                arrays[VALUES] = self._converted(arrays[VALUES])
            yield Rows(arrays)

    def _converted(self, values: np.ndarray) -> np.ndarray:
        stored, wanted = self._tensors["rows"].dtype, self.record.schema.dtype
        return values if stored == wanted else as_dtype(as_float32(values, stored), wanted)

    def _row_bytes(self, name: str) -> int:
        tensor = self._tensors.get(name, _Tensor("int64", (0,), 0))
        return DTYPES[tensor.dtype].itemsize * math.prod(tensor.shape[1:])

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        if name not in self._tensors:  # scores
            return np.zeros(count, DTYPES["int64"])
        tensor = self._tensors[name]
        offset = tensor.offset + first * self._row_bytes(name)
        return read_array(self.path, offset, DTYPES[tensor.dtype].str, (count, *tensor.shape[1:]))

    def places(self, key: int) -> list[str]:
        offset = self._tensors["ids"].offset
        found = []
        for first in range(0, self.rows, PIECE_BYTES // 8):
            keys = self._read("ids", first, min(PIECE_BYTES // 8, self.rows - first))
            found += [f"{self.path}, offset {offset + (first + row) * 8}" for row in np.flatnonzero(keys == key)]
        return found

    def close(self) -> None:
        """The file is open only while it is read."""
