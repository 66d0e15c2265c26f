"""The files themselves, read with nothing but NumPy and the page that specifies them; and the golden checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.optim import RowWiseAdagrad

from dynamicemb import DynamicEmbDump, DynamicEmbEvictStrategy, DynamicEmbLoad
from dynamicemb.checkpoint.files.lineage import ancestor_of
from dynamicemb.checkpoint.files.manifest import Counters, OptimizerRecord, Placement, TableRecord
from dynamicemb.checkpoint.files.reader import Checkpoint
from dynamicemb.checkpoint.files.schema import Rows, TableSchema
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from dynamicemb.shard.tables import dynamic_tables
from dynamicemb.table.ancestor import Ancestor
from tests.checkpoint.models import Model, contents, model, train
from tests.distributed import run_on_ranks
from tests.oracle import mix64
from tests.shard.models import collection, distribute, dynamic, table

#: As it was at first, and with what the tables follow.
GOLDEN = {name: Path(__file__).parent / "golden" / name for name in ("version1", "version1_follows")}
#: Digests of the golden checkpoints, by which later ones would name them.
DIGESTS = {
    "version1": ("e1ddb198cf39e131ba4ff9a8aaf6d9fc", "ab1e753df352d983445896b0149bf5e7"),
    "version1_follows": ("ab8be6f2b47b055dcd20c3e62adab7de", "61ec6d78c8a14ba4766eb68c4a013034"),
}
DTYPES = {"int64": "<i8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def _dump(rank: int, world_size: int, folder: str) -> Any:
    module = model("adam")
    train(module, range(5), rank, world_size)
    DynamicEmbDump(f"{folder}/dump", module, optim=True)
    return contents(module)


def _checksum(document: dict[str, Any]) -> str:
    own = {name: value for name, value in document.items() if name != "crc32"}
    return f"{zlib.crc32(json.dumps(own, sort_keys=True, separators=(',', ':')).encode()):08x}"


def test_a_dump_is_what_the_page_says(tmp_path: Path) -> None:
    held: dict[str, dict[int, tuple[Any, ...]]] = {}
    for tables in run_on_ranks(2, _dump, str(tmp_path)):
        for name, rows in tables.items():
            held.setdefault(name, {}).update(rows)
    folder = tmp_path / "dump"
    document = json.loads((folder / "manifest.json").read_text())
    assert (document["format"], document["version"], document["kind"]) == ("dynamicemb-checkpoint", 1, "full")
    assert document["crc32"] == _checksum(document)
    assert list(document["collections"]) == ["model.embeddings"]
    for name, entries in document["collections"]["model.embeddings"].items():
        arrays = {}
        for part, entry in entries["parts"].items():
            assert entry["file"] == f"{name}_{part}"
            path = folder / "model.embeddings" / entry["file"]
            arrays[part] = np.fromfile(path, DTYPES[entry["dtype"]]).reshape(entry["shape"])
            assert entry["crc32"] == [f"{zlib.crc32(path.read_bytes()):08x}"]
        keys = arrays["keys"].tolist()
        mixed = [mix64(key) for key in keys]
        assert mixed == sorted(set(mixed)) and len(keys) == entries["rows"] == entries["table_rows"]
        assert entries["keys_sum"] == f"{sum(mixed) % 2**64:016x}"
        assert list(entries["parts"]) == ["keys", "values", "scores", "opt_exp_avg", "opt_exp_avg_sq"]
        rows = {
            key: (score, *(arrays[part][i].tobytes() for part in ("values", "opt_exp_avg", "opt_exp_avg_sq")))
            for i, (key, score) in enumerate(zip(keys, arrays["scores"].tolist()))
        }
        assert rows == held[name]
        assert entries["optimizer"]["kind"] == "adam" and entries["optimizer"]["steps"] == entries["clock"] == 5
        assert entries["placement"]["world_size"] == 2 and entries["since"] is None
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * 5


# --------------------------------------------------------------------------------------------------- golden


def golden_rows() -> Rows:
    """Seven rows with keys from all over, and numbers that every dtype has exactly."""
    keys = np.array(sorted([0, 1, -1, 7, -(2**63), 2**63 - 1, 1234567890123], key=mix64), np.int64)
    values = (np.arange(keys.size * 4).reshape(-1, 4) / 8 - 1).astype(np.float32)
    return Rows(
        {
            "keys": keys,
            "values": (values.view(np.uint32) >> 16).astype(np.uint16),  # bfloat16
            "scores": np.arange(10, 10 + keys.size, dtype=np.int64),
            "opt_sum": (np.arange(keys.size, dtype=np.float32) / 4).reshape(-1, 1),
        }
    )


def write_golden(folder: Path, follows: bool) -> None:
    """A full checkpoint and a delta, with every field filled, or all but what they follow."""
    schema, rows = TableSchema(4, "bfloat16", (("sum", 1),)), golden_rows()
    record = TableRecord(
        schema=schema,
        rows=0,
        parts={},
        optimizer=OptimizerRecord("rowwise_adagrad", True, 12, {"learning_rate": 0.125, "eps": 1e-8}),
        evict_strategy="lfu",
        clock=16,
        custom_score=-3,
        counters=Counters(hits=100, evicted=5, refused=2),
        seed=42,
        initializer={"mode": "constant", "value": 0.5},
        bucket_capacity=16,
        table_rows=len(rows),
        keys_sum=sum(mix64(key) for key in rows.keys.tolist()) % 2**64,
        placement=Placement(2, 32, (16, 32)),
    )
    with CheckpointWriter(folder / "full") as writer:
        item = writer.table("model.embeddings", "item", schema)
        item.write(rows[:3])
        item.write(rows[3:])
        item.finish(record, (Ancestor(16, "00112233445566778899aabbccddeeff"),) if follows else None)
    with Checkpoint(folder / "full") as full:
        history = (Ancestor(16, None), ancestor_of(full.table("item").record, "item"))
    gone = rows.keys[5:6]
    with CheckpointWriter(folder / "delta", "delta") as writer:
        item = writer.table("model.embeddings", "item", schema)
        item.write(rows[1:3])
        item.write_evicted(gone)
        keys_sum = (record.keys_sum - mix64(int(gone[0]))) % 2**64
        changed = dataclasses.replace(record, clock=20, since=16, table_rows=6, keys_sum=keys_sum)
        item.finish(changed, history if follows else None)


@pytest.mark.parametrize("golden_name", GOLDEN)
@pytest.mark.parametrize("kind", ["full", "delta"])
def test_the_golden_checkpoint_is_still_written(kind: str, golden_name: str, tmp_path: Path) -> None:
    write_golden(tmp_path, golden_name == "version1_follows")
    here, golden = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / kind, GOLDEN[golden_name] / kind)
    )
    documents = [json.loads(files.pop("manifest.json")) for files in (here, golden)]
    assert here == golden
    for document in documents:
        assert document.pop("crc32") == _checksum(document)
        document.pop("package_version")
    assert documents[0] == documents[1]


@pytest.mark.parametrize("golden_name", GOLDEN)
def test_the_golden_checkpoint_is_still_read(golden_name: str) -> None:
    golden = GOLDEN[golden_name]
    with Checkpoint(golden / "full") as full, Checkpoint(golden / "delta") as delta:
        stored, expected = full.table("item"), golden_rows()
        scan = stored.scan()
        pieces = list(scan)
        assert stored.check_spans(scan.spans) == []
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(pieces[0].rows.arrays[name], array)
        assert [stored.find(int(key)) for key in expected.keys] == list(range(7)) and stored.find(2) is None
        record = stored.record
        assert (record.clock, record.custom_score, record.seed, record.counters.refused) == (16, -3, 42, 2)
        assert record.placement == Placement(2, 32, (16, 32)) and record.optimizer.hyperparameters["eps"] == 1e-8
        changed = delta.table("item")
        assert (changed.record.since, changed.record.clock, changed.rows) == (16, 20, 2)
        assert [keys.tolist() for keys in changed.evicted()] == [expected.keys[5:6].tolist()]
        assert tuple(one.record.digest("item") for one in (stored, changed)) == DIGESTS[golden_name]
        if golden_name == "version1":
            assert record.follows is None and changed.record.follows is None
        else:
            assert record.follows == (Ancestor(16, "00112233445566778899aabbccddeeff"),)
            assert changed.record.follows == (Ancestor(16, None), Ancestor(16, DIGESTS[golden_name][0]))


def _load_golden(rank: int, world_size: int, folder: str) -> dict[int, int]:
    options = {"evict_strategy": DynamicEmbEvictStrategy.LFU, "bucket_capacity": 16, "embedding_dtype": torch.bfloat16}
    module = distribute(
        Model(collection(table("item", 64, 4))), {"item": dynamic(**options)}, (RowWiseAdagrad, {"lr": 1.0})
    )
    DynamicEmbLoad([f"{folder}/full", f"{folder}/delta"], module, optim=True)
    one = dynamic_tables(module)[0]
    assert int(one.group.clock[0]) == 20 and int(one.group.steps[0]) == 12
    return {key: row[0] for key, row in contents(module)["item"].items()}


@pytest.mark.parametrize("golden_name", GOLDEN)
def test_the_golden_chain_is_still_loaded(golden_name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN[golden_name], tmp_path / "golden")
    rows = golden_rows()
    expected = dict(zip(rows.keys.tolist(), rows.scores.tolist()))
    del expected[int(rows.keys[5])]
    first, second = run_on_ranks(2, _load_golden, str(tmp_path / "golden"))
    assert {**first, **second} == expected and not set(first) & set(second)
