"""``dynamicemb diff``: against two dictionaries, whatever pieces the files are read in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamicemb.checkpoint.files import reader
from dynamicemb.checkpoint.files.manifest import Counters
from dynamicemb.checkpoint.files.reader import Checkpoint
from dynamicemb.checkpoint.inspection.compare import compare
from tests.checkpoint.histories import History
from tests.cli.checkpoints import Arrays, file, flip, table, write
from tests.cli.command import dynamicemb
from tests.exploring import examples
from tests.oracle import mix64


def differences(a: Path, b: Path) -> dict[str, Any]:
    """The one table of ``diff --json``; the exit code says whether it differs."""
    result = dynamicemb("diff", a, b, "--json")
    document = result.document
    assert result.code == (0 if document["equal"] else 1)
    [compared] = document["tables"]
    assert compared["equal"] == document["equal"]
    return compared


def without(arrays: Arrays, rows: list[int]) -> Arrays:
    return {name: np.delete(array, rows, axis=0) for name, array in arrays.items()}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", 1000)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_same_rows_from_other_numbers_of_ranks(tmp_path: Path, dtype: str) -> None:
    a = write(tmp_path / "a", {"item": table(dtype=dtype)}, world_size=1)
    b = write(tmp_path / "b", {"item": table(dtype=dtype)}, world_size=3)
    result = dynamicemb("diff", a, b)
    assert (result.code, result.err) == (0, "")
    assert "the same, 300 rows" in result.out
    assert differences(a, b)["common"] == 300


@pytest.mark.usefixtures("small_pieces")
def test_keys_only_in_one(tmp_path: Path) -> None:
    record, arrays = table()
    gone_a, gone_b = [0, 5, 299], [1, 2, 150, 298]
    a = write(tmp_path / "a", {"item": (record, without(arrays, gone_a))})
    b = write(tmp_path / "b", {"item": (record, without(arrays, gone_b))})
    found = differences(a, b)
    assert found["only_a"] == {"count": 4, "examples": arrays["keys"][gone_b].tolist()}
    assert found["only_b"] == {"count": 3, "examples": arrays["keys"][gone_a].tolist()}
    assert found["common"] == 293 and found["changed"]["count"] == 0
    shown = dynamicemb("diff", a, b)
    assert shown.code == 1
    assert str(arrays["keys"][299]) in shown.out


@pytest.mark.usefixtures("small_pieces")
def test_by_how_much_rows_differ(tmp_path: Path) -> None:
    (record, arrays), (_, other) = table(), table()
    other["values"][3, 2] += 0.5
    other["values"][200, 7] -= 2
    other["opt_exp_avg"][3, 0] = np.nan
    other["scores"][9] = arrays["scores"][9] + 1000
    a, b = write(tmp_path / "a", {"item": (record, arrays)}), write(tmp_path / "b", {"item": (record, other)})
    found = differences(a, b)
    assert found["changed"] == {"count": 3, "examples": arrays["keys"][[3, 9, 200]].tolist()}
    values, moments, scores = (found["parts"][name] for name in ("values", "opt_exp_avg", "scores"))
    expected = float(np.abs(arrays["values"].astype(np.float64) - other["values"]).max())
    assert values == {"rows": 2, "max_difference": expected, "key": int(arrays["keys"][200]), "non_finite": 0}
    assert moments == {"rows": 1, "max_difference": 0, "key": None, "non_finite": 1}
    assert scores == {"rows": 1, "max_difference": 1000, "key": int(arrays["keys"][9]), "non_finite": 0}
    assert found["parts"]["opt_exp_avg_sq"]["rows"] == 0
    assert "1 differing numbers are infinite or NaN" in dynamicemb("diff", a, b).out


def test_scores_as_far_apart_as_can_be(tmp_path: Path) -> None:
    (record, arrays), (_, other) = table(strategy="customized"), table(strategy="customized")
    arrays["scores"][4], other["scores"][4] = -(2**63), 2**63 - 1
    a, b = write(tmp_path / "a", {"item": (record, arrays)}), write(tmp_path / "b", {"item": (record, other)})
    assert differences(a, b)["parts"]["scores"]["max_difference"] == 2**64 - 1


def test_equal_bits_are_equal_and_a_negative_zero_is_not_zero(tmp_path: Path) -> None:
    (record, arrays), (_, other) = table(), table()
    arrays["values"][0], other["values"][0] = np.nan, np.nan
    a, b = write(tmp_path / "a", {"item": (record, arrays)}), write(tmp_path / "b", {"item": (record, other)})
    assert differences(a, b)["equal"]
    arrays["values"][0], other["values"][0] = 0.0, -0.0
    a, b = write(tmp_path / "c", {"item": (record, arrays)}), write(tmp_path / "d", {"item": (record, other)})
    assert differences(a, b)["parts"]["values"] == {
        "rows": 1, "max_difference": 0, "key": int(arrays["keys"][0]), "non_finite": 0
    }  # fmt: skip


def test_settings_dtypes_states_and_tables(tmp_path: Path) -> None:
    record, arrays = table(kind="sgd")
    trained = dataclasses.replace(record, clock=6000, counters=Counters(50, 6, 7))
    a = write(tmp_path / "a", {"item": (record, arrays), "user": table()})
    b = write(tmp_path / "b", {"item": (trained, arrays), "ad": table()})
    document = dynamicemb("diff", a, b, "--json").document
    assert (document["only_a"], document["only_b"]) == (["model.embedding_module/user"], ["model.embedding_module/ad"])
    settings_found = {setting["name"]: (setting["a"], setting["b"]) for setting in document["tables"][0]["settings"]}
    assert settings_found == {"clock": (5000, 6000), "counters.hits": (5, 50)}

    half, exact = table(kind="sgd", dtype="float16"), table(kind="adagrad")
    exact[1]["values"] = half[1]["values"].astype(np.float32)
    found = differences(write(tmp_path / "c", {"item": half}), write(tmp_path / "d", {"item": exact}))
    names = {setting["name"] for setting in found["settings"]}
    assert {"dtype", "states.sum", "optimizer.kind"} <= names
    assert found["parts"]["values"]["rows"] == 0


def test_deltas(tmp_path: Path) -> None:
    history = History()
    history.step({1: 10, 2: 20, 3: 30}, set())
    history.step({}, set())
    history.step({4: 40}, {2})
    a = history.write(tmp_path / "a", since=2)
    history.step({}, {3})
    b = history.write(tmp_path / "b", since=2)
    found = differences(a, b)
    assert found["evicted_only_b"] == {"count": 1, "examples": [3]}
    assert found["evicted_only_a"]["count"] == found["changed"]["count"] == 0
    full = dynamicemb("diff", a, history.write(tmp_path / "full"))
    assert full.code == 1 and "A is a delta checkpoint, B a full one" in full.out


def test_a_damaged_checkpoint_is_an_error_not_a_difference(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, {"item": table()}) for name in "ab")
    flip(file(b, "values"), 100)
    result = dynamicemb("diff", a, b, "--json")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {file(b, 'values')}, offset 0: ") and result.err.count("\n") == 1


KEYS = st.dictionaries(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 20), st.integers(0, 3), max_size=40)


@settings(max_examples=examples(25))
@given(KEYS, KEYS, st.integers(8, 400))
def test_any_two_tables(tmp_path_factory: pytest.TempPathFactory, a: dict, b: dict, piece_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    paths = [write(folder / name, {"item": _scored(scores)}) for name, scores in (("a", a), ("b", b))]
    with pytest.MonkeyPatch.context() as patch, Checkpoint(paths[0]) as first, Checkpoint(paths[1]) as second:
        patch.setattr(reader, "PIECE_BYTES", piece_bytes)
        [found] = compare(first, second).tables
    assert found.only_a.count == len(a.keys() - b.keys())
    assert found.only_b.count == len(b.keys() - a.keys())
    assert found.common == len(a.keys() & b.keys())
    changed = sorted((key for key in a.keys() & b.keys() if a[key] != b[key]), key=mix64)
    assert (found.changed.count, found.changed.examples) == (len(changed), changed[:5])
    assert found.parts["scores"].max_difference == max((abs(a[key] - b[key]) for key in changed), default=0)


def _scored(scores: dict[int, int]) -> Any:
    record, _ = table(rows=0, kind="sgd")
    keys = sorted(scores, key=mix64)
    values = np.ones((len(keys), 8), np.float32)
    numbers = np.array([scores[key] for key in keys], np.int64)
    return record, {"keys": np.array(keys, np.int64), "values": values, "scores": numbers}


def test_many_tables_take_a_line_each(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(1, 27)]
    tables = {name: table(rows=20, kind="sgd") for name in names}
    a, b = write(tmp_path / "a", tables), write(tmp_path / "b", tables)
    same = dynamicemb("diff", a, b)
    assert (same.code, same.out) == (0, "26 tables: the same, 520 rows\nthe same\n")
    changed = {name: table(rows=20, kind="sgd", seed=9 * (index >= 2)) for index, name in enumerate(names)}
    b = write(tmp_path / "c", changed)
    shown = dynamicemb("diff", a, b)
    assert shown.code == 1 and len(shown.out.splitlines()) <= 40
    assert max(map(len, shown.out.splitlines())) <= 80
    listed = [line.split()[0] for line in shown.out.splitlines() if line.startswith("  c")]
    assert listed == names[2:] and "2 tables: the same, 40 rows" in shown.out
    one = dynamicemb("diff", a, b, "--table", "c10")
    assert one.code == 1 and "c10 in model.embedding_module: differs" in one.out and "largest difference" in one.out
    assert "c11" not in one.out
    assert dynamicemb("diff", a, b, "--table", "c2").code == 0
    document = dynamicemb("diff", a, b, "--json").document
    assert [entry["table"] for entry in document["tables"]] == names
    assert not document["equal"]
    assert dynamicemb("diff", a, b, "--json", "--table", "c1").document["equal"]


def test_tables_that_only_one_has_are_counted_and_named(tmp_path: Path) -> None:
    made = table(rows=5, kind="sgd")
    a = write(tmp_path / "a", {f"c{number}": made for number in range(1, 61)})
    b = write(tmp_path / "b", {"c2": made, "only": made})
    shown = dynamicemb("diff", a, b)
    assert shown.code == 1 and len(shown.out.splitlines()) <= 10
    assert "59 tables of model.embedding_module: only in A: c1, c3, c4, " in shown.out
    assert "c40 and 20\nmore" in shown.out
    assert "1 table of model.embedding_module: only in B: only" in shown.out
    assert dynamicemb("diff", a, b, "--table", "c2").code == 0
    alone = dynamicemb("diff", a, b, "--table", "only")
    assert alone.code == 1 and "only in B" in alone.out and "only in A" not in alone.out
    missing = dynamicemb("diff", a, b, "--table", "nope")
    assert missing.code == 1 and missing.err.startswith("error: ") and missing.err.count("\n") == 1
