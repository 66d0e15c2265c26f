"""``dynamicemb verify``: silent about what is whole, and a list of all that is not."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynamicemb.checkpoint.files.manifest import Placement
from dynamicemb.checkpoint.files.schema import Rows
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from dynamicemb.checkpoint.inspection import table_check
from tests.checkpoint.histories import SCHEMA, History
from tests.cli.checkpoints import COLLECTION, file, flip, table, write
from tests.cli.command import dynamicemb
from tests.oracle import mix64, unmix64

KEYS = f"{COLLECTION}/item_keys"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight keys at a time; a real process, which reads more, is in test_command.py."""
    monkeypatch.setattr(table_check, "PIECE_BYTES", 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", {"item": table(), "user": table(kind="sgd", dtype="bfloat16", seed=1)})


def problems(path: Path) -> list[tuple[str, object, str]]:
    """What ``verify --json`` lists; the exit code says whether it is anything."""
    result = dynamicemb("verify", path, "--json")
    document = result.document
    assert (result.code, document["ok"]) == ((1, False) if document["problems"] else (0, True))
    assert result.err == ""
    return [(problem["file"], problem["offset"], problem["message"]) for problem in document["problems"]]


def test_a_whole_checkpoint(path: Path) -> None:
    result = dynamicemb("verify", path)
    assert result.code == 0 and result.err == ""
    assert "ok, full checkpoint: 2 tables, 600 rows, 9 files" in result.out
    assert problems(path) == []


def test_an_empty_table_is_whole(tmp_path: Path) -> None:
    assert problems(write(tmp_path / "empty", {"item": table(rows=0)})) == []


@pytest.mark.parametrize("part", ["values", "scores", "opt_exp_avg", "opt_exp_avg_sq"])
def test_a_flipped_bit(path: Path, part: str) -> None:
    flip(file(path, part), 77)
    [(name, offset, message)] = problems(path)
    assert (name, offset) == (f"{COLLECTION}/item_{part}", 0)
    assert "CRC-32" in message


def test_a_flipped_bit_of_a_key(path: Path) -> None:
    flip(file(path, "keys"), 80)
    found = problems(path)
    assert {name for name, _, _ in found} == {KEYS}
    assert any("CRC-32" in message for _, _, message in found)
    assert any("add up to" in message for _, _, message in found)


def test_every_damage_is_listed(path: Path) -> None:
    flip(file(path, "values"), 5)
    os.truncate(file(path, "scores"), 100)
    file(path, "values", "user").unlink()
    with open(file(path, "keys", "user"), "ab") as longer:
        longer.write(b"12345678")
    found = {name.rpartition("/")[2]: (offset, message) for name, offset, message in problems(path)}
    assert set(found) == {"item_values", "item_scores", "user_values", "user_keys"}
    assert found["item_scores"] == (100, "100 bytes, but the manifest says 2400 (300 rows of 8)")
    assert found["user_keys"] == (2400, "2408 bytes, but the manifest says 2400 (300 rows of 8)")
    assert "No such file" in found["user_values"][1]
    result = dynamicemb("verify", path)
    assert result.code == 1
    assert "4 problems" in result.out and "restore the files from a copy" in result.out
    assert f"{COLLECTION}/item_scores, offset 100: 100 bytes" in result.out


def test_swapped_files(path: Path) -> None:
    first, second = file(path, "opt_exp_avg"), file(path, "opt_exp_avg_sq")
    first.rename(path / "between")
    second.rename(first)
    (path / "between").rename(second)
    assert [name for name, _, _ in problems(path)] == [
        f"{COLLECTION}/item_{p}" for p in ("opt_exp_avg", "opt_exp_avg_sq")
    ]


def test_a_key_that_occurs_twice_and_one_out_of_order(tmp_path: Path) -> None:
    # Written with right checksums: only the keys themselves tell.
    record, arrays = table()
    keys = arrays["keys"]
    keys[7], keys[[20, 21]] = keys[6], keys[[21, 20]]
    found = problems(write(tmp_path / "bad", {"item": (record, arrays)}))
    assert found[0] == (KEYS, 7 * 8, f"key {keys[6]} occurs twice")
    assert found[1] == (KEYS, 21 * 8, f"key {keys[21]} follows key {keys[20]}, which its mixed key should not")
    assert len(found) == 2


def test_of_many_problems_of_one_kind_a_few_are_listed(tmp_path: Path) -> None:
    record, arrays = table()
    arrays["keys"][:] = arrays["keys"][::-1].copy()
    found = problems(write(tmp_path / "bad", {"item": (record, arrays)}))
    assert len(found) == 11
    assert found[-1][2] == "289 more keys that occur twice or are out of order"


def test_rows_that_are_not_those_of_the_table(tmp_path: Path) -> None:
    whole, (record, arrays) = table(), table()
    fewer = {name: np.delete(array, 4, axis=0) for name, array in arrays.items()}
    path = tmp_path / "bad"
    with CheckpointWriter(path) as checkpoint:
        writer = checkpoint.table(COLLECTION, "item", record.schema)
        writer.write(Rows(fewer))
        keys_sum = sum(mix64(key) for key in whole[1]["keys"].tolist()) % 2**64
        writer.finish(dataclasses.replace(record, table_rows=300, keys_sum=keys_sum))
    found = problems(path)
    assert [name for name, _, _ in found] == ["manifest.json", KEYS]
    assert "299 rows in the files, but the table had 300" in found[0][2]


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_with_room_for_their_rows_and_without(tmp_path: Path, world_size: int) -> None:
    # Two buckets of 64 slots on each rank. As many rows as fit into the second bucket of the last rank, then one more.
    record, _ = table(rows=1, kind="sgd")
    placement = Placement(world_size, 128, (128,) * world_size)
    for rows in (64, 65):
        first = 2**64 - 2**64 // (2 * world_size) + 1
        keys = np.array([unmix64(first + 1000 * row) for row in range(rows)], np.int64)
        _, arrays = table(rows=rows, kind="sgd")
        crowded = (dataclasses.replace(record, placement=placement), {**arrays, "keys": keys})
        found = problems(write(tmp_path / f"{rows}", {"item": crowded}))
        if rows == 64:
            assert found == []
        else:
            [(name, _, message)] = found
            assert name == KEYS
            assert message.startswith(f"65 rows belong to bucket 1 of rank {world_size - 1}, which has 64 slots")


def test_slots_that_no_table_has(tmp_path: Path) -> None:
    record, arrays = table()
    odd = dataclasses.replace(record, placement=Placement(2, 64 * 64, (64 * 64, 64 * 63)))
    [(name, _, message)] = problems(write(tmp_path / "odd", {"item": (odd, arrays)}))
    assert name == "manifest.json"
    assert "rank 1 has 4032 slots" in message


def test_deltas(tmp_path: Path) -> None:
    history = History()
    history.step({1: 10, 2: 20, 3: 30}, set())
    history.step({}, set())
    history.step({4: 40}, {2})
    path = history.write(tmp_path / "delta", since=2)
    assert problems(path) == []
    assert "delta checkpoint" in dynamicemb("verify", path).out
    flip(path / "model.embeddings" / "item_evicted", 0)
    assert {name for name, _, _ in problems(path)} == {"model.embeddings/item_evicted"}


def test_a_key_that_has_gone_and_has_a_row(tmp_path: Path) -> None:
    history = History()
    history.step({1: 10, 2: 20}, set())
    keys = sorted([1, 2], key=mix64)
    with CheckpointWriter(tmp_path / "delta", "delta") as checkpoint:
        writer = checkpoint.table("model.embeddings", "t", SCHEMA)
        writer.write(history.arrays(keys))
        writer.write_evicted(np.array(sorted([9, 2], key=mix64), np.int64))
        writer.finish(history.record(0))
    [(name, offset, message)] = problems(tmp_path / "delta")
    assert name == "model.embeddings/t_evicted"
    assert (offset, message) == (8 * sorted([9, 2], key=mix64).index(2), "key 2 has gone, but has a row too")


def test_no_checkpoint_a_damaged_manifest_and_one_that_was_not_finished(path: Path, tmp_path: Path) -> None:
    [(name, offset, message)] = problems(tmp_path / "nothing")
    assert (name, offset) == ("manifest.json", None)
    assert "not a checkpoint" in message
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"rows": 300', '"rows": 301', 1))
    assert problems(path)[0][0] == "manifest.json"
    (path / "manifest.json").write_text(text[:500])
    [(_, offset, _)] = problems(path)
    assert offset == 500 or offset == len(text[:500].rstrip())


def test_what_does_not_belong_is_noted(path: Path) -> None:
    (path / "README").write_text("mine")
    shutil.copytree(path, path.with_name("checkpoint.unfinished"))
    result = dynamicemb("verify", path, "--json")
    assert result.code == 0
    names = [note.split()[0] for note in result.document["notes"] if "not say what came before" not in note]
    assert names == ["checkpoint.unfinished", "README"]
