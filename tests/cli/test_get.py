"""``dynamicemb get``: rows of single ids, however they are typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.histories import History
from tests.cli.checkpoints import Arrays, table, write
from tests.cli.command import dynamicemb


@pytest.fixture
def arrays() -> Arrays:
    return table(dtype="bfloat16")[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", {"item": table(dtype="bfloat16"), "user": table(seed=3, kind="sgd")})


def test_every_row(path: Path, arrays: Arrays) -> None:
    result = dynamicemb("get", path, "item", "--json", "--", *arrays["keys"])
    assert result.code == 0
    document = result.document
    assert (document["collection"], document["table"]) == ("model.embedding_module", "item")
    values = (arrays["values"].astype(np.uint32) << 16).view(np.float32)
    for row, found in enumerate(document["rows"]):
        key = int(arrays["keys"][row])
        assert (found["asked"], found["key"], found["found"], found["row"]) == (str(key), key, True, row)
        assert found["score"] == arrays["scores"][row]
        assert found["values"] == values[row].tolist()
        assert found["opt_exp_avg"] == arrays["opt_exp_avg"][row].tolist()


@pytest.mark.parametrize("typed", [["-1"], ["--", "-1"], ["18446744073709551615"]])
def test_negative_and_unsigned_ids(path: Path, typed: list[str]) -> None:
    result = dynamicemb("get", path, "item", "--json", *typed)
    assert result.code == 0
    assert result.document["rows"][0]["key"] == -1


@pytest.mark.parametrize(("typed", "key"), [("9223372036854775808", -(2**63)), ("-9223372036854775808", -(2**63))])
def test_the_least_id(path: Path, typed: str, key: int) -> None:
    result = dynamicemb("get", path, "item", typed)
    assert result.code == 0
    shown = typed if typed == str(key) else f"{typed} (stored as {key})"
    assert result.out.startswith(f"{shown}  score ")


def test_an_absent_id_is_shown_beside_others(path: Path) -> None:
    result = dynamicemb("get", path, "item", "0", "123456789", "-35")
    assert (result.code, result.err) == (1, "")
    assert "123456789  absent" in result.out and "-35  absent" in result.out
    assert result.out.startswith("0  score ")
    found = dynamicemb("get", path, "item", "0", "123456789", "--json").document["rows"]
    assert [row["found"] for row in found] == [True, False]


def test_lines_fit_the_screen(path: Path) -> None:
    assert max(map(len, dynamicemb("get", path, "item", "0").out.splitlines())) <= 80


def test_an_id_that_a_delta_says_has_gone(tmp_path: Path) -> None:
    history = History()
    history.step({1: 10, 2: 20}, set())
    history.step({}, set())
    history.step({4: 40}, {2})
    path = history.write(tmp_path / "delta", since=2)
    result = dynamicemb("get", path, "item", "4", "2", "1")
    assert result.code == 1
    assert "2  gone: evicted or erased" in result.out and "1  absent" in result.out
    assert [row.get("gone") for row in dynamicemb("get", path, "item", "4", "2", "1", "--json").document["rows"]] == [
        None, True, False
    ]  # fmt: skip


@pytest.mark.parametrize("typed", ["x", "1.5", "18446744073709551616", "-9223372036854775809", "--jsn", "-"])
def test_what_is_no_id(path: Path, typed: str) -> None:
    result = dynamicemb("get", path, "item", typed)
    assert (result.code, result.out) == (2, "")
    assert typed in result.err


def test_an_unknown_table(path: Path) -> None:
    result = dynamicemb("get", path, "thing", "1")
    assert (result.code, result.out) == (1, "")
    assert "no table is called 'thing'" in result.err and "model.embedding_module/user" in result.err
    assert dynamicemb("get", path, "model.embedding_module/user", "0").code == 0
