"""Made-up histories of a table in dictionaries, and the checkpoints that a training run would have written of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from dynamicemb.checkpoint.files.manifest import Counters, OptimizerRecord, Placement, TableRecord
from dynamicemb.checkpoint.files.schema import KEYS, SCORES, VALUES, Rows, TableSchema, opt
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from tests.oracle import mix64

SCHEMA = TableSchema(dim=3, dtype="float32", states=(("sum", 1),))
COLLECTION = "model.embeddings"


@dataclasses.dataclass
class History:
    """A table that is trained: what it holds, when each row was touched and when each key went.

    Attributes:
        rows: value by key.
        touched: step of the last touch by key.
        gone: step at which a key was last evicted.
    """

    clock: int = 0
    rows: dict[int, int] = dataclasses.field(default_factory=dict)
    touched: dict[int, int] = dataclasses.field(default_factory=dict)
    gone: dict[int, int] = dataclasses.field(default_factory=dict)

    def step(self, touched: Mapping[int, int], evicted: set[int]) -> None:
        """One step: ``evicted`` make room for ``touched``, value by key."""
        self.clock += 1
        for key in evicted & set(self.rows):
            del self.rows[key], self.touched[key]
            self.gone[key] = self.clock
        for key, value in touched.items():
            self.rows[key], self.touched[key] = value, self.clock

    def record(self, since: Optional[int] = None) -> TableRecord:
        return TableRecord(
            schema=SCHEMA,
            rows=0,
            parts={},
            optimizer=OptimizerRecord("rowwise_adagrad", True, self.clock, {"learning_rate": 0.5}),
            clock=self.clock,
            counters=Counters(self.clock, len(self.gone), 0),
            table_rows=len(self.rows),
            keys_sum=sum(map(mix64, self.rows)) % 2**64,
            since=since,
            placement=Placement(2, 1024, (512, 1024)),
        )

    def write(self, path: Path, since: Optional[int] = None, *names: str, **changes: Any) -> Path:
        """A checkpoint of this table alone, or under several names: a full one, or what changed since step ``since``.
        ``changes`` are made to what the manifest says of it."""
        schema = changes.pop("schema", SCHEMA)
        rows = [key for key in self.rows if since is None or self.touched[key] >= since]
        gone = [key for key, step in self.gone.items() if step > (since or 0) and key not in self.rows]
        with CheckpointWriter(path, "full" if since is None else "delta") as writer:
            for name in names or ("item",):
                table = writer.table(COLLECTION, name, schema)
                table.write(self.arrays(sorted(rows, key=mix64)))
                if since is not None:
                    table.write_evicted(np.array(sorted(gone, key=mix64), np.int64))
                table.finish(dataclasses.replace(self.record(since), **changes))
        return path

    def arrays(self, keys: list[int]) -> Rows:
        """The rows of ``keys`` as they are on disk."""
        values = np.array([self.rows[key] for key in keys], np.float32)
        return Rows({
            KEYS: np.array(keys, np.int64),
            VALUES: np.stack([values, values + 1, -values], 1),
            SCORES: np.array([self.touched[key] for key in keys], np.int64),
            opt("sum"): values[:, None] * 3,
        })  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, the manifest included, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
