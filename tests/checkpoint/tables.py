"""Tables made by NumPy, written as checkpoints and as dumps of others, and a plain reader that compares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from dynamicemb.checkpoint.files.manifest import Counters, OptimizerRecord, Placement, TableRecord, read_manifest
from dynamicemb.checkpoint.files.schema import Rows, TableSchema, mixed_keys
from dynamicemb.checkpoint.files.writer import CheckpointWriter

HYPERPARAMETERS = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 0.0},
    "adagrad": {"learning_rate": 0.1, "eps": 1e-7, "initial_accumulator_value": 0.25},
    "rowwise_adagrad": {"learning_rate": 0.3, "eps": 1e-8},
    "adam": {"learning_rate": 0.001, "eps": 1e-8, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.01},
}
CLOCK = 5000


def states_of(kind: str, dim: int) -> tuple[tuple[str, int], ...]:
    """Name and width of an optimizer's states, written down here once more."""
    return {
        "sgd": (),
        "adagrad": (("sum", dim),),
        "rowwise_adagrad": (("sum", 1),),
        "adam": (("exp_avg", dim), ("exp_avg_sq", dim)),
    }[kind]


def random_keys(rows: int, seed: int = 0) -> np.ndarray:
    """Distinct int64, with those that break things: 0, -1 and both extremes."""
    special = np.array([0, -1, 2**63 - 1, -(2**63), 1, -2], np.int64)
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63, rows, np.int64, endpoint=False)
    keys[: min(rows, 6)] = special[: min(rows, 6)]
    assert np.unique(keys).size == rows
    return keys


def random_rows(
    rows: int, dim: int, dtype: str, kind: str, seed: int = 0, strategy: str = "lru"
) -> dict[str, np.ndarray]:
    """Arrays by part, in no order. Values have every bit pattern that is a finite number, and infinities."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {"keys": random_keys(rows, seed)}
    if dtype == "bfloat16":
        values = generator.standard_normal((rows, dim)).astype(np.float32)
        arrays["values"] = (values.view(np.uint32) >> 16).astype(np.uint16)
        arrays["values"][:1, :1] = 0x7F80
    else:
        arrays["values"] = generator.standard_normal((rows, dim)).astype(dtype)
        arrays["values"][:1, :1] = np.inf
    arrays["values"][:1, 1:2] = 1  # a subnormal number of bfloat16, too
    scores = generator.integers(3, CLOCK, rows) if strategy == "lru" else generator.integers(-9, 2**62, rows)
    arrays["scores"] = scores.astype(np.int64)
    for name, width in states_of(kind, dim):
        arrays[f"opt_{name}"] = generator.standard_normal((rows, width)).astype(np.float32)
    return arrays


def record_of(dim: int, dtype: str, kind: str, strategy: str = "lru", saved: bool = True, **fields: Any) -> TableRecord:
    """A record in which nothing has its default."""
    return TableRecord(
        schema=TableSchema(dim, dtype, states_of(kind, dim) if saved else ()),
        rows=0,
        parts={},
        optimizer=OptimizerRecord(kind, saved=saved, steps=321, hyperparameters=HYPERPARAMETERS[kind]),
        evict_strategy=strategy,
        clock=CLOCK,
        custom_score=17,
        counters=Counters(hits=5, evicted=6, refused=7),
        seed=99,
        initializer={"mode": "uniform", "lower": -0.5, "upper": 0.5},
        bucket_capacity=64,
        **fields,
    )


def write_native(path: Path, tables: Mapping[tuple[str, str], tuple[TableRecord, dict[str, np.ndarray]]]) -> None:
    """A checkpoint of ours, of tables by collection and name."""
    with CheckpointWriter(path) as checkpoint:
        for (collection, table), (record, arrays) in tables.items():
            mixed = mixed_keys(arrays["keys"])
            order = np.argsort(mixed)
            writer = checkpoint.table(collection, table, record.schema)
            writer.write(Rows({part.name: arrays[part.name][order] for part in record.schema.parts}))
            placement = Placement(world_size=1, max_slots=1 << 20, slots=(1 << 20,))
            total = int(mixed.sum(dtype=np.uint64))
            keys = arrays["keys"].size
            writer.finish(dataclasses.replace(record, table_rows=keys, keys_sum=total, placement=placement))


def stored_arrays(path: Path, collection: str, table: str) -> dict[str, np.ndarray]:
    """A table's files as arrays, read by NumPy from what the manifest says of them."""
    record = read_manifest(path).tables[collection][table]
    arrays = {}
    for part, entry in record.files:
        array = np.fromfile(path / collection / f"{table}_{part.name}", part.empty(0).dtype)
        arrays[part.name] = array.reshape(part.shape(entry.rows))
    return arrays


def assert_same_rows(stored: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """``stored`` is in the order of a checkpoint and has just the rows of ``expected``, bit for bit."""
    assert set(stored) == set(expected)
    order = np.argsort(mixed_keys(expected["keys"]))
    for name, array in expected.items():
        assert stored[name].dtype == array.dtype and stored[name].shape == array.shape, name
        assert stored[name].tobytes() == np.ascontiguousarray(array[order]).tobytes(), name


def files_below(path: Path) -> dict[str, bytes]:
    """Content by relative path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_nvidia(
    folder: Path,
    table: str,
    keys: np.ndarray,
    values: np.ndarray,
    world_size: int = 2,
    scores: Optional[np.ndarray] = None,
    states: Optional[np.ndarray] = None,
    states_item: str = "emb_opt_values",
) -> None:
    """The newer layout, rows dealt out to ranks in turn (a reader must not rely on which rank has which key)."""
    folder.mkdir(parents=True, exist_ok=True)
    items = {"emb_keys": keys.astype("<i8"), "emb_values": values.astype("<f4")}
    if scores is not None:
        items["emb_scores"] = scores.astype("<i8")
    if states is not None:
        items[states_item] = states.astype("<f4")
    for rank in range(world_size):
        for item, array in items.items():
            array[rank::world_size].tofile(folder / f"{table}_{item}.rank_{rank}.world_size_{world_size}")
