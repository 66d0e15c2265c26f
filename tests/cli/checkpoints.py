"""Real checkpoints for the command's tests, and what they hold in plain dictionaries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from dynamicemb.checkpoint.files.manifest import Placement, TableRecord
from dynamicemb.checkpoint.files.schema import Rows
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from tests.checkpoint.tables import random_rows, record_of
from tests.oracle import mix64

COLLECTION = "model.embedding_module"
Arrays = dict[str, np.ndarray]


def table(
    rows: int = 300, dtype: str = "float32", kind: str = "adam", strategy: str = "lru", seed: int = 0
) -> tuple[TableRecord, Arrays]:
    """A record and arrays by part with finite values, in the order of a checkpoint."""
    record = record_of(8, dtype, kind, strategy)
    arrays = random_rows(rows, 8, dtype, kind, seed, strategy)
    arrays["values"][:1, :1] = 0
    order = sorted(range(rows), key=lambda row: mix64(int(arrays["keys"][row])))
    return record, {part.name: arrays[part.name][order] for part in record.schema.parts}


def write(path: Path, tables: dict[str, tuple[TableRecord, Arrays]], world_size: int = 2) -> Path:
    """A checkpoint of ``tables`` by name, spread over ranks that had room for them."""
    with CheckpointWriter(path) as checkpoint:
        for name, (record, arrays) in tables.items():
            writer = checkpoint.table(COLLECTION, name, record.schema)
            writer.write(Rows(arrays))
            keys_sum = sum(mix64(key) for key in arrays["keys"].tolist()) % 2**64
            stated = {"table_rows": arrays["keys"].size, "keys_sum": keys_sum}
            if record.placement is None:
                stated["placement"] = Placement(world_size, 64 * 64, (64 * 64,) * world_size)
            writer.finish(dataclasses.replace(record, **stated))
    return path


def file(path: Path, part: str, name: str = "item") -> Path:
    return path / COLLECTION / f"{name}_{part}"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
