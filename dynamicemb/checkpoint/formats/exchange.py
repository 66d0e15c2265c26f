"""Where rows come from when a checkpoint is converted: one interface for our own files and for those of others."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np

from dynamicemb.checkpoint.files.entry import Entry
from dynamicemb.checkpoint.files.manifest import OptimizerRecord, PartRecord, TableRecord
from dynamicemb.checkpoint.files.reader import StoredTable
from dynamicemb.checkpoint.files.schema import Rows, TableSchema
from dynamicemb.errors import CheckpointError, ConfigError

__all__ = [
    "NO_HINTS",
    "Hints",
    "NativeSource",
    "Source",
    "StrippedSource",
    "as_dtype",
    "as_float32",
    "described",
    "foreign_record",
    "read_array",
    "record_from",
    "score_bounds",
]

#: Stands for the table's own name in what :func:`described` returns, so that a file may be renamed.
_ANY_TABLE = "table"


@dataclass(frozen=True)
class Hints:
    """What a user says of files that do not tell it themselves; None: nothing.

    Attributes:
        dim: columns of the embeddings, in an NVIDIA dump.
        dtype: of the rows that are to come out: float32, float16 or bfloat16.
        evict_strategy: ``lru``, ``lfu`` or ``customized``: what scores mean.
    """

    dim: Optional[int] = None
    dtype: Optional[str] = None
    evict_strategy: Optional[str] = None

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise ConfigError(f"dim={self.dim} is not a positive integer")
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r} is not a dtype of rows; use float32, float16 or bfloat16")
        if self.evict_strategy not in (None, "lru", "lfu", "customized"):
            raise ConfigError(f"evict_strategy={self.evict_strategy!r} is not known; use lru, lfu or customized")


NO_HINTS = Hints()


class Source(Protocol):
    """One table somewhere, its sizes and descriptions already checked.

    Attributes:
        collection, table: its name.
        rows: how many it has.
        record: what a manifest is to say of it; ``rows``, ``parts``, ``table_rows`` and ``keys_sum`` do not matter.
        sorted: whether rows come in ascending order of their mixed keys, without duplicates.
    """

    @property
    def collection(self) -> str: ...
    @property
    def table(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def record(self) -> TableRecord: ...
    @property
    def sorted(self) -> bool: ...

    def pieces(self) -> Iterator[Rows]:
        """All rows, in pieces of about 16 MiB, with the parts of ``record.schema``.

        Raises:
            CheckpointError: they cannot be read, or are damaged.
        """

    def places(self, key: int) -> list[str]:
        """File and offset of every occurrence of ``key``; for messages, so it may take long."""

    def close(self) -> None:
        """Closes its files."""


class NativeSource:
    """A table of one of our own checkpoints; checksums and order are checked as it is read."""

    sorted = True

    def __init__(self, stored: StoredTable) -> None:
        self._stored = stored
        self.collection, self.table = stored.collection, stored.table
        self.rows, self.record = stored.rows, stored.record

    def pieces(self) -> Iterator[Rows]:
        scan = self._stored.scan()
        for piece in scan:
            yield piece.rows
        problems = self._stored.check_spans(scan.spans)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(f"{problems[0]}{more}")

    def places(self, key: int) -> list[str]:
        row = self._stored.find(key)
        return [] if row is None else [f"{self._stored.path('keys')}, offset {row * 8}"]

    def close(self) -> None:
        self._stored.close()


class StrippedSource:
    """A source without its optimizer state."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.collection, self.table, self.rows = source.collection, source.table, source.rows
        self.sorted, self.places, self.close = source.sorted, source.places, source.close
        optimizer = dataclasses.replace(source.record.optimizer, saved=False)
        schema = source.record.schema.without_states()
        self.record = dataclasses.replace(source.record, schema=schema, optimizer=optimizer, follows=None)

    def pieces(self) -> Iterator[Rows]:
        for rows in self._source.pieces():
            yield Rows({part.name: rows.arrays[part.name] for part in self.record.schema.parts})


def foreign_record(schema: TableSchema, **fields: Any) -> TableRecord:
    """A record for a table that nothing more is known of than ``fields``; SGD, nothing saved, LRU, if they do not."""
    fields.setdefault("optimizer", OptimizerRecord("sgd", saved=False, steps=0, hyperparameters={}))
    return TableRecord(schema=schema, rows=0, parts={}, **fields)


def described(record: TableRecord) -> dict[str, Any]:
    """What a table is apart from its rows, as JSON: kept in files for others so that nothing is lost on the way back.

    Ranks and sizes are left out. The inverse of :func:`record_from`.
    """
    parts = {part.name: PartRecord(0, ()) for part in record.schema.parts}
    bare = dataclasses.replace(
        record, rows=0, parts=parts, since=None, placement=None, table_rows=0, keys_sum=0, follows=None
    )
    return bare.to_json(_ANY_TABLE)


def record_from(path: Path, where: str, description: object) -> TableRecord:
    """The record that :func:`described` told of, each field checked as in a manifest.

    Args:
        path, where: for messages: the file, and the place in it.
        description: parsed JSON, or its text.

    Raises:
        CheckpointError: it is malformed.
    """
    if isinstance(description, str):
        try:
            description = json.loads(description)
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{path}: {where}, character {error.pos}: not JSON ({error.msg}); restore the file from a copy"
            ) from None
    if not isinstance(description, dict):
        raise CheckpointError(f"{path}: {where} is not an object; restore the file from a copy")
    return TableRecord.from_json(Entry(path, where, description), _ANY_TABLE)


def as_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values``, as they are on disk in ``dtype``, as float32: exact."""
    if dtype == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 ``values`` in ``dtype`` as it is on disk, to the nearest, ties to even; exact for what came from it."""
    if dtype == "float16":
        with np.errstate(over="ignore"):  # beyond 65504: infinity, as everywhere
            return values.astype("<f2")
    if dtype == "float32":
        return values.astype("<f4", copy=False)
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # wraps for NaN only, which is dealt with next
    quiet = (bits >> 16) | np.where(bits & 0x7F0000, 0, 0x40).astype("<u4")
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype("<u2")


def read_array(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array out of a file of raw values.

    Raises:
        CheckpointError: the file cannot be read, or ends before the array does.
    """
    array = np.empty(shape, dtype)
    view, done = array.reshape(-1).view(np.uint8).data, 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{path}, offset {offset + done}: the file ends here; restore the file from a copy"
                    )
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}, offset {offset + done}: {error.strerror}") from error
    return array


def score_bounds(pieces: Iterable[np.ndarray]) -> Optional[tuple[int, int]]:
    """Least and greatest of all scores, int64 or uint64 in pieces; None of none."""
    bounds = [int(bound) for scores in pieces if scores.size for bound in (scores.min(), scores.max())]
    return (min(bounds), max(bounds)) if bounds else None
