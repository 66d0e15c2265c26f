"""Dumped on W ranks, loaded on V: every row once, on its owner, read from disk once, and the same bytes again."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from dynamicemb import DynamicEmbDump, DynamicEmbLoad, DynamicEmbWarning
from dynamicemb.checkpoint.files.manifest import read_manifest
from dynamicemb.checkpoint.files.reader import StoredTable
from dynamicemb.shard.tables import dynamic_tables
from tests.checkpoint.models import contents, digests, joined, model, train
from tests.distributed import run_on_ranks
from tests.oracle import TableModel, owner

SIZES = (1, 2, 3, 4)
ROOMY: dict[str, Any] = {"optimizer": "adam", "capacity": 8192}


def _dump(rank: int, world_size: int, folder: str) -> Any:
    module = model(**ROOMY)
    train(module, range(6), rank, world_size)
    DynamicEmbDump(f"{folder}/from{world_size}", module, optim=True)
    return contents(module)


def _load(rank: int, world_size: int, folder: str) -> Any:
    loaded, ranges = [], []
    read_part = StoredTable.read_part

    def recorded(self: StoredTable, part: str, first: int, stop: int) -> Any:
        if stop - first > 1:  # a single row is looked at to find where a range begins
            ranges.append((self.folder.name, self.table, part, first, stop))
        return read_part(self, part, first, stop)

    StoredTable.read_part = recorded  # type: ignore[method-assign]
    for size in SIZES:
        module = model(**ROOMY)
        DynamicEmbLoad(f"{folder}/from{size}", module, optim=True)
        loaded.append(contents(module))
        for table in dynamic_tables(module):
            assert all(owner(key, world_size) == rank for key in contents(module)[table.name])
        DynamicEmbDump(f"{folder}/from{size}to{world_size}", module, optim=True)
    return loaded, ranges


def _described(path: Path) -> dict[str, Any]:
    """What the manifest says, but for how the rows were spread; digests, which later deltas follow, included."""
    tables = read_manifest(path).tables["model.embeddings"]
    return {name: (dataclasses.replace(one, placement=None), one.digest(name)) for name, one in tables.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="module")
def dumped(folder: Path) -> dict[int, dict[str, dict]]:
    return {size: joined(run_on_ranks(size, _dump, str(folder))) for size in SIZES}


@pytest.mark.parametrize("world_size", SIZES)
def test_every_row_once_on_its_owner(world_size: int, folder: Path, dumped: dict[int, dict[str, dict]]) -> None:
    results = run_on_ranks(world_size, _load, str(folder))
    for number, size in enumerate(SIZES):
        assert joined([loaded[number] for loaded, _ in results]) == dumped[size]
        written = digests(folder / f"from{size}")
        assert len(written) == 15
        assert digests(folder / f"from{size}to{world_size}") == written
        assert _described(folder / f"from{size}to{world_size}") == _described(folder / f"from{size}")
    read: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for _, ranges in results:
        for checkpoint, table, part, first, stop in ranges:
            read.setdefault((checkpoint, table, part), []).append((first, stop))
    for (checkpoint, table, part), spans in read.items():
        end = 0
        for first, stop in sorted(spans):
            assert first in (end, end + 1), (
                f"{checkpoint} {table} {part}: {sorted(spans)}"
            )  # a lone row is not recorded
            end = stop
        assert end in (rows := len(dumped[int(checkpoint[4:])][table]), rows - 1)


def _smaller(rank: int, world_size: int, folder: str) -> Any:
    module = model(optimizer="adam", capacity=256)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DynamicEmbWarning)
        DynamicEmbLoad(f"{folder}/from2", module, optim=True)
    messages = [str(one.message) for one in caught if issubclass(one.category, DynamicEmbWarning)]
    return contents(module), messages


def test_a_smaller_capacity_keeps_the_highest_scores(folder: Path, dumped: dict[int, dict[str, dict]]) -> None:
    results = run_on_ranks(2, _smaller, str(folder))
    kept = joined([rows for rows, _ in results])
    total_left_out = {}
    for name, rows in dumped[2].items():
        bucket_capacity = 8 if name == "t2" else 16
        expected = {}
        for rank in range(2):
            place = TableModel(128, 128, bucket_capacity, 2, rank)
            by_bucket: dict[int, list[tuple[int, int]]] = {}
            for key, row in rows.items():
                if owner(key, 2) == rank:
                    by_bucket.setdefault(place.bucket(key), []).append((row[0], key))
            for entries in by_bucket.values():
                expected.update({key: rows[key] for _, key in sorted(entries)[-bucket_capacity:]})
        assert kept[name] == expected
        total_left_out[name] = len(rows) - len(expected)
        assert total_left_out[name] > 0
    for _, messages in results:
        assert len(messages) == 1
        assert all(
            f"'{name}': {count} of {len(dumped[2][name])} rows" in messages[0] for name, count in total_left_out.items()
        )
