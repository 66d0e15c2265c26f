"""The command as such: help, usage, exit codes, a quick start, and every verb without a model as a real process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.histories import History, files
from tests.cli.checkpoints import file, flip, table, write
from tests.cli.command import ROOT, Result, dynamicemb, process
from tests.processes import TIMEOUT_SECONDS

VERBS = ("inspect", "verify", "diff", "get", "convert", "merge", "dump", "load")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", {"item": table()})


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str) -> None:
    result = dynamicemb(verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"dynamicemb {verb}" in result.out.partition("Example:")[2]
    assert max(map(len, result.out.splitlines())) <= 80


def test_help_names_every_verb() -> None:
    result = dynamicemb("--help")
    assert result.code == 0
    assert all(f" {verb} " in result.out for verb in VERBS)
    assert dynamicemb("--version").out.startswith("dynamicemb ")


@pytest.mark.parametrize("line", [
    "", "frob", "verify", "verify a b", "verify a --frob", "diff a", "get a", "get a t", "merge a b", "convert a b",
    "convert a b --to zip", "convert a b --to native --world-size 2", "convert a b --to nvidia --world-size 0",
    "inspect a --top -1", "dump --model m:f", "load --path a", "dump --model no_colon --path a",
    "dump --model no.such.module:f --path a", "load --model tests.cli.models:no_such --path a",
    "load --model tests.cli.models:NOT_A_FUNCTION --path a",
])  # fmt: skip
def test_wrong_usage(line: str) -> None:
    assert dynamicemb(*line.split()).code == 2


@pytest.mark.parametrize("arguments", [
    ("inspect", "{}"), ("get", "{}", "item", "1"), ("diff", "{}", "{}"), ("convert", "{}", "{}.out", "--to", "native"),
    ("merge", "{}", "{}", "{}.out"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_one_line_of_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    place = str(tmp_path / "[red]nothing[/red]")
    result = dynamicemb(*(argument.replace("{}", place) for argument in arguments))
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert "[red]nothing[/red]" in result.err


def test_a_start_without_slow_imports() -> None:
    code = (
        "import sys; before = set(sys.modules); import dynamicemb.cli; "
        "print({'torchrec', 'numba', 'triton', 'matplotlib', 'pyarrow', 'dynamicemb.checkpoint'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_verbs_as_real_processes(path: Path, tmp_path: Path) -> None:
    shown = process("inspect", path)
    assert (shown.code, shown.err) == (0, "")
    assert "300 rows" in shown.out
    verified = process("verify", path, "--json")
    assert verified.code == 0 and verified.document["ok"]
    found = process("get", path, "item", "-2", "-77", "--json")
    assert (found.code, [row["found"] for row in found.document["rows"]]) == (1, [True, False])
    assert process("get", path, "item", "0.5").code == 2
    flip(file(path, "values"), 3)
    damaged = process("verify", path)
    assert damaged.code == 1 and "item_values, offset 0: segment 0 has the CRC-32" in damaged.out
    compared = process("diff", path, tmp_path / "nothing")
    assert (compared.code, compared.out) == (1, "")
    assert compared.err.startswith("error: ") and "Traceback" not in compared.err


def test_a_reader_that_stops_early(path: Path) -> None:
    command = f"{sys.executable} -m dynamicemb inspect {path} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_SECONDS)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


@pytest.mark.parametrize("to", ["nvidia", "parquet", "safetensors"])
def test_convert_there_and_back(path: Path, tmp_path: Path, to: str) -> None:
    if to != "nvidia":
        pytest.importorskip({"parquet": "pyarrow"}.get(to, to))
    ranks = ["--world-size", "2"] if to == "nvidia" else []
    there = dynamicemb("convert", path, tmp_path / "other", "--to", to, *ranks)
    assert (there.code, there.err) == (0, "")
    assert there.out.startswith(f"converted to {tmp_path / 'other'}: ")
    back = dynamicemb("convert", tmp_path / "other", tmp_path / "back", "--to", "native", "--json")
    assert (back.code, back.err) == (0, "")
    assert (back.document["to"], back.document["files"]) == ("native", 6)
    compared = dynamicemb("diff", path, tmp_path / "back", "--json").document["tables"][0]
    assert compared["common"] == 300
    assert compared["only_a"]["count"] == compared["only_b"]["count"] == compared["changed"]["count"] == 0


def test_convert_as_a_process_and_without_overwriting(path: Path, tmp_path: Path) -> None:
    assert process("convert", path, tmp_path / "copy", "--to", "native").code == 0
    assert dynamicemb("diff", path, tmp_path / "copy").code == 0
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    refused = dynamicemb("convert", path, tmp_path / "taken", "--to", "native")
    assert refused.code == 1 and "--overwrite" in refused.err
    assert (tmp_path / "taken" / "mine").exists()
    assert dynamicemb("convert", path, tmp_path / "taken", "--to", "native", "--overwrite").code == 0
    assert not (tmp_path / "taken" / "mine").exists()


def _chain(tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """A full checkpoint, two deltas, and the full checkpoint at the end."""
    history = History()
    history.step({1: 10, 2: 20, -3: 30}, set())
    base = history.write(tmp_path / "base")
    history.step({4: 40, 1: 11}, {2})
    first = history.write(tmp_path / "first", since=1)
    history.step({2: 21}, {4})
    second = history.write(tmp_path / "second", since=2)
    return base, first, second, history.write(tmp_path / "end")


def test_merge(tmp_path: Path) -> None:
    base, first, second, end = _chain(tmp_path)
    result = process("merge", base, first, second, tmp_path / "merged", "--json")
    assert result.code == 0
    assert result.document["sources"] == [str(base), str(first), str(second)]
    assert files(tmp_path / "merged") == files(end)
    assert dynamicemb("verify", tmp_path / "merged").code == 0
    shown = dynamicemb("merge", base, first, second, base)
    assert shown.code == 0 and shown.out.startswith(f"merged to {base}: 5 files")
    assert files(base) == files(end)


def test_merge_with_a_gap(tmp_path: Path) -> None:
    base, _, second, _ = _chain(tmp_path)
    result = dynamicemb("merge", base, second, tmp_path / "merged")
    assert _is_error(result)
    assert not (tmp_path / "merged").exists()


def _is_error(result: Result) -> bool:
    return result.code == 1 and result.out == "" and result.err.startswith("error: ") and result.err.count("\n") == 1
