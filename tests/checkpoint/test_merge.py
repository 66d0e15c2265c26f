"""A chain of checkpoints as one: the bytes of a full one, whatever the sizes of blocks; what is no chain is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamicemb import CheckpointError
from dynamicemb.checkpoint import chain
from dynamicemb.checkpoint.chain import ChainedTable
from dynamicemb.checkpoint.files.manifest import OptimizerRecord
from dynamicemb.checkpoint.files.reader import Checkpoint
from dynamicemb.checkpoint.files.schema import TableSchema
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from dynamicemb.checkpoint.merge import merge
from dynamicemb.checkpoint.passes import problems_of
from dynamicemb.kernels.hashing import owner_range
from tests.checkpoint.histories import COLLECTION, SCHEMA, History, files
from tests.exploring import examples
from tests.oracle import mix64


@pytest.fixture(autouse=True)
def unsynchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power cut is tested here, and the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


KEYS = st.integers(-40, 40)
STEP = st.tuples(st.dictionaries(KEYS, st.integers(0, 1000), max_size=12), st.sets(KEYS, max_size=8))
#: A dump after some steps; how far before the last one it begins.
DUMP = st.tuples(st.lists(STEP, max_size=4), st.integers(0, 3))
PROPERTY = settings(
    max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def written(folder: Path, dumps: list[tuple[list, int]]) -> tuple[History, list[Path]]:
    """A full checkpoint of the first dump's state, then deltas, overlapping by as many steps as the dumps say."""
    history, paths, last = History(), [], 0
    for number, (steps, overlap) in enumerate(dumps):
        for touched, evicted in steps:
            history.step(touched, evicted - set(touched))
        since = max(0, last - overlap) if number else None
        paths.append(history.write(folder / f"{number}", since))
        last = history.clock
    return history, paths


@PROPERTY
@given(st.lists(DUMP, min_size=1, max_size=5), st.integers(1, 7))
def test_merged_is_the_later_full_dump(dumps: list[tuple[list, int]], block_rows: int) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "PIECE_BYTES", block_rows * SCHEMA.row_bytes * len(dumps))
        folder = Path(name)
        history, paths = written(folder, dumps)
        merge(paths, folder / "merged")
        assert files(folder / "merged") == files(history.write(folder / "expected"))


@PROPERTY
@given(st.lists(DUMP, min_size=2, max_size=5), st.integers(1, 7), st.integers(1, 3))
def test_ranges_are_the_whole_and_read_every_byte_once(
    dumps: list[tuple[list, int]], block_rows: int, world_size: int
) -> None:
    """Checksums by range join to those of the manifests only if no byte is left out or read twice."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "PIECE_BYTES", block_rows * SCHEMA.row_bytes * len(dumps))
        history, paths = written(Path(name), dumps)
        checkpoints = [Checkpoint(path) for path in paths]
        source = ChainedTable([checkpoint.tables[COLLECTION, "item"] for checkpoint in checkpoints])
        passes = [source.between(*owner_range(rank, world_size)) for rank in range(world_size)]
        pieces = [piece for one in passes for piece in one]
        assert {key: int(row) for piece in pieces for key, row in zip(piece.rows.keys, piece.rows.values[:, 0])} == (
            history.rows
        )
        assert sum(len(piece.rows) for piece in pieces) == source.record.rows == len(history.rows)
        assert all(len(piece.rows) <= block_rows * 2 * len(dumps) for piece in pieces)
        assert problems_of(source, [one.spans for one in passes]) == []
        for checkpoint in checkpoints:
            checkpoint.close()


@PROPERTY
@given(st.lists(DUMP, min_size=2, max_size=5), st.data())
def test_deltas_merge_to_one_delta(dumps: list[tuple[list, int]], data: st.DataObject) -> None:
    """The one that would have been written at the end, since the first step that one of them begins at."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        history, paths = written(folder, dumps)
        merge(paths[1:], folder / "delta")
        with Checkpoint(folder / "delta") as checkpoint:
            assert checkpoint.manifest.kind == "delta"
            since = checkpoint.table("item").record.since
        assert files(folder / "delta") == files(history.write(folder / "expected", since))
        merge([paths[0], folder / "delta"], folder / "merged")
        assert files(folder / "merged") == files(history.write(folder / "full"))


@pytest.fixture
def run(tmp_path: Path) -> tuple[History, list[Path]]:
    """Keys 0 to 9, then a delta in which 0 goes, one in which 1 goes, and one in which 0 comes back."""
    steps = [({key: key for key in range(10)}, set()), ({2: 20}, {0}), ({3: 30}, {1}), ({0: 5}, set())]
    history, paths = History(), []
    for number, (touched, evicted) in enumerate(steps):
        history.step(touched, evicted)
        paths.append(history.write(tmp_path / f"{number}", number or None))
    return history, paths


def test_a_full_checkpoint_alone_is_copied(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    merge(run[1][:1], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(run[1][0])


def test_the_destination_may_be_the_base(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    history, paths = run
    merge(paths, paths[0])
    assert files(paths[0]) == files(history.write(tmp_path / "expected"))


def test_progress_ends_with_all_rows(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    merge(run[1], tmp_path / "merged", progress=lambda *call: calls.append(call))
    assert calls[-1] == ("item", 9, 9)


def assert_refused(paths: list[Path], destination: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        merge(paths, destination)
    assert all(word in str(raised.value) for word in words), raised.value
    assert list(destination.parent.glob(f"{destination.name}*")) == []


def test_a_gap_is_an_error_that_names_both_steps(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    _, (full, first, second, third) = run
    assert_refused([full, second, third], tmp_path / "merged", "a gap", "since step 2", "at step 1")
    assert_refused([full, first, third], tmp_path / "merged", "a gap", "since step 3", "at step 2")


def test_a_wrong_order_is_an_error(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    history, (full, first, second, _) = run
    assert_refused([full, second, first], tmp_path / "merged", "a gap")
    whole = history.write(tmp_path / "whole", 1)
    assert_refused([full, whole, first], tmp_path / "merged", "a wrong order", "step 2", "step 4")
    assert_refused([first, full], tmp_path / "merged", "can only be the first")
    assert_refused([full, full], tmp_path / "merged", "can only be the first")


def test_no_checkpoints_are_an_error(tmp_path: Path) -> None:
    assert_refused([], tmp_path / "merged", "no checkpoints")


def test_deltas_of_another_run_are_noticed(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    """Steps fit, keys do not: the sum of the whole table's keys does not come out."""
    other = History()
    for keys in ([100], [101], [102]):
        other.step(dict.fromkeys(keys, 1), set())
    foreign = other.write(tmp_path / "foreign", 1, table_rows=4)
    assert_refused([run[1][0], foreign], tmp_path / "merged", "foreign", "13 keys", "4 that the table had")


def test_another_table_is_an_error(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    other = run[0].write(tmp_path / "other", 1, "user")
    assert_refused([run[1][0], other], tmp_path / "merged", "no table 'item'", "same tables")
    more = run[0].write(tmp_path / "more", 1, "item", "user")
    assert_refused([run[1][0], more], tmp_path / "merged", f"{run[1][0]} has no table 'user'", "same tables")


def test_a_later_delta_may_begin_earlier(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    history, paths = run
    merge([paths[2], history.write(tmp_path / "longer", 1)], tmp_path / "delta")
    assert files(tmp_path / "delta") == files(history.write(tmp_path / "expected", 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": TableSchema(3, "float32"), "optimizer": OptimizerRecord("rowwise_adagrad", False, 1, {})},
         ("has no optimizer state", "same optim")),
        ({"optimizer": OptimizerRecord("adagrad", True, 1, {})}, ("optimizer adagrad", "rowwise_adagrad")),
        ({"evict_strategy": "lfu"}, ("evict_strategy lfu", "lru")),
    ],
)  # fmt: skip
def test_deltas_of_another_kind_are_an_error(
    changes: dict, words: tuple[str, ...], run: tuple[History, list[Path]], tmp_path: Path
) -> None:
    assert_refused([run[1][0], run[0].write(tmp_path / "other", 1, **changes)], tmp_path / "merged", *words)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("number", "part"),
    [(number, part) for number in (0, 1) for part in ("keys", "values", "scores", "opt_sum")] + [(1, "evicted")],
)
def test_damage_anywhere_is_found(number: int, part: str, run: tuple[History, list[Path]], tmp_path: Path) -> None:
    _flip(run[1][number] / COLLECTION / f"item_{part}")
    assert_refused(run[1], tmp_path / "merged", f"item_{part}", "offset", "restore the file from a copy")


def test_a_key_both_here_and_gone_is_an_error(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    """As no dump writes it; checksums are right."""
    history, delta = History(clock=2, rows={2: 20, 3: 30}, touched={2: 2, 3: 2}), tmp_path / "delta"
    with CheckpointWriter(delta, "delta") as writer:
        table = writer.table(COLLECTION, "item", SCHEMA)
        table.write(history.arrays([2]))
        table.write_evicted(np.array([2], np.int64))
        table.finish(dataclasses.replace(history.record(1), table_rows=9))
    assert_refused([run[1][0], delta], tmp_path / "merged", "item_evicted", "key 2 has gone", "item_keys has it")


@pytest.mark.parametrize("part", ["keys", "evicted"])
def test_a_wrong_order_of_keys_is_an_error(part: str, run: tuple[History, list[Path]], tmp_path: Path) -> None:
    """As no dump writes it; checksums are right."""
    history, delta = History(clock=2, rows={2: 20, 3: 30}, touched={2: 2, 3: 2}), tmp_path / "delta"
    falling = sorted([2, 3], key=mix64, reverse=True)
    with CheckpointWriter(delta, "delta") as writer:
        table = writer.table(COLLECTION, "item", SCHEMA)
        table.write(history.arrays(falling if part == "keys" else []))
        table.write_evicted(np.array(falling if part == "evicted" else [], np.int64))
        table.finish(dataclasses.replace(history.record(1), table_rows=8))
    words = (f"item_{part}, offset 8", f"key {falling[1]} follows key {falling[0]}")
    assert_refused([run[1][0], delta], tmp_path / "merged", *words)


def test_a_wrong_order_between_blocks_is_an_error(
    run: tuple[History, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "PIECE_BYTES", 2 * 2 * SCHEMA.row_bytes)  # blocks of two rows in each of two files
    one, two, three, four = sorted(range(2, 6), key=mix64)
    history, delta = (
        History(clock=2, rows=dict.fromkeys(range(2, 6), 1), touched=dict.fromkeys(range(2, 6), 2)),
        "delta",
    )
    with CheckpointWriter(tmp_path / delta, "delta") as writer:
        table = writer.table(COLLECTION, "item", SCHEMA)
        table.write(history.arrays([one, three, two, four]))
        table.write_evicted(np.array([], np.int64))
        table.finish(dataclasses.replace(history.record(1), table_rows=10))
    words = ("item_keys, offset 16", f"key {two} follows key {three}")
    assert_refused([run[1][0], tmp_path / delta], tmp_path / "merged", *words)


@pytest.mark.parametrize("block_rows", [1, 1000])
def test_a_delta_with_all_rows_needs_no_tombstones(
    block_rows: int, run: tuple[History, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since step 0, of a model that had not noted which keys went: older rows do not count."""
    monkeypatch.setattr(chain, "PIECE_BYTES", block_rows * 3 * SCHEMA.row_bytes)
    history, (full, first, *_) = run
    history.gone = {}
    everything = history.write(tmp_path / "everything", 0)
    expected = files(history.write(tmp_path / "expected"))
    merge([full, first, everything], tmp_path / "merged")
    assert files(tmp_path / "merged") == expected
    merge([first, everything], tmp_path / "delta")
    merge([full, tmp_path / "delta"], tmp_path / "merged")
    assert files(tmp_path / "merged") == expected


def test_a_missing_or_shorter_file_is_an_error(run: tuple[History, list[Path]], tmp_path: Path) -> None:
    file = run[1][2] / COLLECTION / "item_evicted"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(run[1], tmp_path / "merged", "item_evicted", "the manifest says 8")
    file.unlink()
    assert_refused(run[1], tmp_path / "merged", "item_evicted", "No such file")
