"""``manifest.json``: what a checkpoint says about itself. Read as from a stranger: nothing in it is taken on trust."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from dynamicemb.checkpoint.files.crc import num_segments
from dynamicemb.checkpoint.files.entry import Entry, hexadecimal
from dynamicemb.checkpoint.files.schema import EVICTED, EVICTED_PART, Part, TableSchema
from dynamicemb.errors import CheckpointError
from dynamicemb.names import natural_order
from dynamicemb.table.ancestor import Ancestor

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SEGMENT_ROWS",
    "VERSION",
    "Counters",
    "Manifest",
    "OptimizerRecord",
    "PartRecord",
    "Placement",
    "TableRecord",
    "file_name",
    "read_manifest",
]

FORMAT, VERSION = "dynamicemb-checkpoint", 1
MANIFEST = "manifest.json"
#: Rows for each of which a file's checksum is kept.
SEGMENT_ROWS = 65536
#: More rows than any file system holds, and few enough that no size overflows 64 bits.
_MAX_ROWS = 2**48
_MAX_DIM = 2**20
#: Half of a SHA-256.
_DIGEST_DIGITS = 32


def file_name(table: str, part: str) -> str:
    return f"{table}_{part}"


@dataclass(frozen=True)
class PartRecord:
    """One file.

    Attributes:
        rows: rows in it.
        crc32: CRC-32 of each segment of ``segment_rows`` rows; the last one may be shorter.
    """

    rows: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class OptimizerRecord:
    """How the table was trained.

    Attributes:
        kind: ``sgd``, ``adagrad``, ``rowwise_adagrad`` or ``adam``.
        saved: whether the optimizer's state is part of the checkpoint (SGD has none, and saves it all the same).
        steps: updates so far, Adam's ``t``.
        hyperparameters: learning rate and the like, by name.
    """

    kind: str
    saved: bool
    steps: int
    hyperparameters: Mapping[str, float]


@dataclass(frozen=True)
class Counters:
    """What happened to keys since the table was made, added up over all ranks; each key once in a training lookup."""

    hits: int = 0
    evicted: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Placement:
    """How the rows were spread when they were written: the only thing that depends on the number of ranks.

    Attributes:
        world_size: ranks.
        max_slots: slots of each rank at full size.
        slots: slots of each rank at the time.
    """

    world_size: int
    max_slots: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class TableRecord:
    """One table of a checkpoint.

    Attributes:
        schema: what its files hold.
        rows: rows in its files: all of the table's, or, in a delta, those that were touched.
        parts: its files by part name.
        segment_rows: rows of a segment.
        optimizer: how it was trained.
        evict_strategy: ``lru``, ``lfu`` or ``customized``: what scores mean.
        clock: training lookups so far.
        custom_score: the score that touched keys get under ``customized``.
        counters: what happened to keys.
        seed: of the initializer.
        initializer: its arguments.
        bucket_capacity: slots of a bucket.
        table_rows: rows of the whole table at the time.
        keys_sum: sum of the mixed keys of the whole table, modulo 2**64; tells whether a chain of deltas is complete.
        since: in a delta: the clock from which on changes are in it. None: everything is.
        placement: how rows were spread over ranks; None for what was not written by a training job.
        follows: the checkpoints before it that it may be applied to, or that are of its own state; None: not known.
    """

    schema: TableSchema
    rows: int
    parts: Mapping[str, PartRecord]
    optimizer: OptimizerRecord
    evict_strategy: str = "lru"
    clock: int = 0
    custom_score: int = 0
    counters: Counters = field(default_factory=Counters)
    seed: int = 0
    initializer: Mapping[str, Any] = field(default_factory=dict)
    bucket_capacity: int = 128
    table_rows: int = 0
    keys_sum: int = 0
    since: Optional[int] = None
    placement: Optional[Placement] = None
    segment_rows: int = SEGMENT_ROWS
    follows: Optional[tuple[Ancestor, ...]] = None

    def digest(self, table: str) -> str:
        """What the table is known by to later checkpoints: everything that is said of it, but for the ranks."""
        document = dataclasses.replace(self, placement=None).to_json(table)
        del document["placement"]
        return hashlib.sha256(_canonical(document)).hexdigest()[:_DIGEST_DIGITS]

    @property
    def evicted_rows(self) -> int:
        """Keys in a delta that have gone."""
        return self.parts[EVICTED].rows if EVICTED in self.parts else 0

    @property
    def files(self) -> tuple[tuple[Part, PartRecord], ...]:
        """Every file with what it holds."""
        parts = (*self.schema.parts, *([EVICTED_PART] if EVICTED in self.parts else []))
        return tuple((part, self.parts[part.name]) for part in parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.row_bytes * record.rows for part, record in self.files)

    def to_json(self, table: str) -> dict[str, Any]:
        return {
            "dim": self.schema.dim,
            "dtype": self.schema.dtype,
            "rows": self.rows,
            "segment_rows": self.segment_rows,
            "parts": {
                part.name: {
                    "file": file_name(table, part.name),
                    "dtype": part.dtype,
                    "shape": list(part.shape(record.rows)),
                    "crc32": [f"{crc:08x}" for crc in record.crc32],
                }
                for part, record in self.files
            },
            "optimizer": dataclasses.asdict(self.optimizer),
            "evict_strategy": self.evict_strategy,
            "clock": self.clock,
            "custom_score": self.custom_score,
            "counters": dataclasses.asdict(self.counters),
            "seed": self.seed,
            "initializer": dict(self.initializer),
            "bucket_capacity": self.bucket_capacity,
            "table_rows": self.table_rows,
            "keys_sum": f"{self.keys_sum:016x}",
            "since": self.since,
            "placement": None if self.placement is None else dataclasses.asdict(self.placement),
            **({} if self.follows is None else {"follows": [dataclasses.asdict(one) for one in self.follows]}),
        }

    @staticmethod
    def from_json(entry: Entry, table: str) -> TableRecord:
        dim, dtype = entry.integer("dim", 1, _MAX_DIM), entry.one_of("dtype", ("float32", "float16", "bfloat16"))
        rows, segment_rows = entry.integer("rows", 0, _MAX_ROWS), entry.integer("segment_rows", 1, _MAX_ROWS)
        parts_entry = entry.mapping("parts")
        states = []
        for name in parts_entry.names():
            if name.startswith("opt_"):
                shape = parts_entry.mapping(name).integers("shape", 0, _MAX_ROWS)
                if len(shape) != 2:
                    raise parts_entry.error(f"{name}: shape {shape} does not have two dimensions")
                states.append((name.removeprefix("opt_"), shape[1]))
        schema = TableSchema(dim, dtype, tuple(states))
        parts = {part.name: _part_record(parts_entry, part, table, rows, segment_rows) for part in schema.parts}
        since = entry.optional_integer("since", 0)
        if since is not None:
            parts[EVICTED] = _part_record(parts_entry, EVICTED_PART, table, None, segment_rows)
        if unknown := set(parts_entry.names()) - set(parts):
            raise parts_entry.error(f"unknown parts {', '.join(sorted(unknown))}")
        optimizer = entry.mapping("optimizer")
        counters = entry.mapping("counters")
        return TableRecord(
            schema=schema,
            rows=rows,
            parts=parts,
            segment_rows=segment_rows,
            optimizer=OptimizerRecord(
                kind=optimizer.one_of("kind", ("sgd", "adagrad", "rowwise_adagrad", "adam")),
                saved=optimizer.boolean("saved"),
                steps=optimizer.integer("steps", 0),
                hyperparameters={name: optimizer.mapping("hyperparameters").number(name)
                                 for name in optimizer.mapping("hyperparameters").names()},
            ),
            evict_strategy=entry.one_of("evict_strategy", ("lru", "lfu", "customized")),
            clock=entry.integer("clock", 0),
            custom_score=entry.integer("custom_score", -(2**63)),
            counters=Counters(*(counters.integer(name.name, 0) for name in dataclasses.fields(Counters))),
            seed=entry.integer("seed", -(2**63), 2**64 - 1),
            initializer=entry.mapping("initializer").value,
            bucket_capacity=entry.integer("bucket_capacity", 1, 2**16),
            table_rows=entry.integer("table_rows", 0, _MAX_ROWS),
            keys_sum=entry.hexadecimal("keys_sum", 16),
            since=since,
            placement=_placement(entry),
            follows=_follows(entry),
        )  # fmt: skip


def _part_record(parts: Entry, part: Part, table: str, rows: Optional[int], segment_rows: int) -> PartRecord:
    entry = parts.mapping(part.name)
    if entry.string("file") != file_name(table, part.name):
        raise entry.error(f"file is {entry.string('file')!r}, not {file_name(table, part.name)!r}")
    entry.one_of("dtype", (part.dtype,))
    shape = entry.integers("shape", 0, _MAX_ROWS)
    if rows is None and shape:
        rows = shape[0]
    if rows is None or tuple(shape) != part.shape(rows):
        raise entry.error(f"shape is {shape}, not {list(part.shape(rows or 0))}")
    crc32 = entry.sequence("crc32")
    if len(crc32) != num_segments(rows, segment_rows):
        raise entry.error(f"{len(crc32)} checksums for {num_segments(rows, segment_rows)} segments")
    return PartRecord(rows, tuple(hexadecimal(entry, "crc32", text, 8) for text in crc32))


def _placement(entry: Entry) -> Optional[Placement]:
    if entry.value.get("placement") is None:
        return None
    placement = entry.mapping("placement")
    world_size = placement.integer("world_size", 1, 2**31)
    slots = placement.integers("slots", 0, _MAX_ROWS)
    if len(slots) != world_size:
        raise placement.error(f"slots of {len(slots)} ranks, but world_size is {world_size}")
    return Placement(world_size, placement.integer("max_slots", 0, _MAX_ROWS), tuple(slots))


def _follows(entry: Entry) -> Optional[tuple[Ancestor, ...]]:
    if entry.value.get("follows") is None:
        return None
    ancestors = []
    for value in entry.sequence("follows"):
        if not isinstance(value, dict):
            raise entry.error(f"'follows' has {value!r}, not an object")
        one = Entry(entry.path, f"{entry.where}.follows", value)
        digest = value.get("digest")
        if digest is not None:
            hexadecimal(one, "digest", digest, _DIGEST_DIGITS)
        ancestors.append(Ancestor(one.integer("step", 0), digest))
    return tuple(ancestors)


def _canonical(document: Mapping[str, Any]) -> bytes:
    """JSON with sorted names and without white space."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _crc32(document: Mapping[str, Any]) -> str:
    """Of a manifest without its own checksum."""
    return f"{zlib.crc32(_canonical(document)):08x}"


@dataclass(frozen=True)
class Manifest:
    """All tables of a checkpoint, ``tables[collection][table]``.

    Attributes:
        kind: ``full``, or ``delta`` for changes since an earlier checkpoint.
        tables: by collection path and table name; as read, both in natural order (``c1``, ``c2``, ``c10``).
        package_version: of dynamicemb, when it was written.
    """

    kind: str
    tables: Mapping[str, Mapping[str, TableRecord]]
    package_version: str

    def to_json(self) -> str:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "package_version": self.package_version,
            "collections": {
                collection: {table: record.to_json(table) for table, record in sorted(tables.items())}
                for collection, tables in sorted(self.tables.items())
            },
        }
        return json.dumps({**document, "crc32": _crc32(document)}, indent=1) + "\n"

    def files(self) -> list[str]:
        """Relative paths of all files that belong to the checkpoint, the manifest included."""
        return [MANIFEST] + [
            f"{collection}/{file_name(table, part.name)}"
            for collection, tables in self.tables.items()
            for table, record in tables.items()
            for part, _ in record.files
        ]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``, every field checked. No other file is looked at.

    Raises:
        CheckpointError: there is none, it is not one of ours, of a newer version, or malformed.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; {folder} is not a checkpoint, or its dump was never finished"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}, offset {error.start}: not UTF-8; restore the file from a copy") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}, offset {error.pos}: not JSON ({error.msg}); restore the file from a copy"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, arrays in thousands of arrays
        raise CheckpointError(f"{path}, offset 0: not a manifest ({error}); restore the file from a copy") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of dynamicemb ('format' is not {FORMAT!r})")
    entry = Entry(path, "", document)
    version = entry.integer("version", 1)
    if version > VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, written by dynamicemb {document.get('package_version')}; "
            f"this one reads up to version {VERSION}: upgrade dynamicemb"
        )
    stated = entry.string("crc32")
    if _crc32({name: value for name, value in document.items() if name != "crc32"}) != stated:
        raise entry.error(f"its content does not have the CRC-32 {stated}")
    kind = entry.one_of("kind", ("full", "delta"))
    tables: dict[str, dict[str, TableRecord]] = {}
    collections = entry.mapping("collections")
    for collection in sorted(collections.names(), key=natural_order):
        collections.check_name(collection)
        by_table = collections.mapping(collection)
        tables[collection] = {}
        for table in sorted(by_table.names(), key=natural_order):
            by_table.check_name(table)
            record = TableRecord.from_json(by_table.mapping(table), table)
            if (record.since is None) != (kind == "full"):
                raise by_table.error(f"{table}: 'since' is {record.since}, but the checkpoint is a {kind} one")
            tables[collection][table] = record
    return Manifest(kind, tables, entry.string("package_version"))
