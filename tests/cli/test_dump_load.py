"""``dynamicemb dump`` and ``load``: real ranks under torchrun, and a single process without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.checkpoints import table, write
from tests.cli.command import ROOT, Result, dynamicemb, process
from tests.processes import TIMEOUT_SECONDS

pytestmark = pytest.mark.slow  # real ranks, each of which imports everything

COLLECTION = "model.embeddings"


def quiet(result: Result) -> str:
    """What the command said on stderr, but for the word about a first compilation."""
    return "".join(line for line in result.err.splitlines(True) if not line.startswith("dynamicemb: compiling "))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that two ranks have dumped."""
    path = tmp_path_factory.mktemp("dumped") / "checkpoint"
    result = process("dump", "--model", "tests.cli.models:trained", "--path", path, "--optim", "--json", ranks=2)
    assert (result.code, quiet(result)) == (0, "")
    document = result.document
    assert (document["action"], document["paths"]) == ("dumped to", [str(path)])
    assert [(entry["collection"], entry["table"]) for entry in document["tables"]] == [
        (COLLECTION, name) for name in ("t0", "t1", "t2")
    ]
    assert document["rows"] == sum(entry["rows"] for entry in document["tables"]) > 300
    return path


def test_what_was_dumped_is_whole_and_has_the_optimizer(dumped: Path) -> None:
    assert dynamicemb("verify", dumped).code == 0
    found = dynamicemb("inspect", dumped, "--json").document["tables"]
    assert all("opt_sum" in entry["parts"] and entry["placement"]["world_size"] == 2 for entry in found)


def test_load_on_ranks(dumped: Path) -> None:
    result = process("load", "--model", "tests.cli.models:empty", "--path", dumped, "--optim", "--ranks", 2)
    assert (result.code, quiet(result)) == (0, "")
    rows = sum(entry["rows"] for entry in dynamicemb("inspect", dumped, "--json").document["tables"])
    assert result.out.startswith(f"loaded {dumped}: 3 tables, {rows} rows") and result.out.count("\n") == 1


def test_an_error_on_ranks_is_one_line_from_rank_0(tmp_path: Path) -> None:
    other = write(tmp_path / "other", {"item": table()})
    result = process("load", "--model", "tests.cli.models:empty", "--path", other, ranks=2)
    assert (result.code, result.out) == (1, "")
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "has no table 't0'" in lines[0]
    # torchrun's report, which a rank cannot prevent, ends with the reason.
    assert f"traceback : {lines[0]}" in result.err.partition("Root Cause")[2]
    quietly = process("load", "--model", "tests.cli.models:empty", "--path", other, "--ranks", 2)
    assert (quietly.code, quietly.out, quiet(quietly)) == (1, "", f"{lines[0]}\n")


def test_wrong_usage_on_ranks_is_said_once(tmp_path: Path) -> None:
    result = process("load", "--model", "tests.cli.models:no_such", "--path", tmp_path, "--ranks", 2)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("Usage:") == result.err.count("has no function") == 1
    assert "Traceback" not in result.err


def test_another_number_of_ranks_than_torchrun_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for verb in ("dump", "load"):
        result = dynamicemb(verb, "--model", "tests.cli.models:empty", "--path", tmp_path, "--ranks", 2)
        assert result.code == 2 and "torchrun has started 4" in result.err


def test_a_function_with_its_own_group_and_chosen_tables(dumped: Path, tmp_path: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    code = (
        "import json, os, sys; os.environ.update(json.loads(sys.argv[1])); "
        "from tests.cli.command import dynamicemb; "
        "print(json.dumps([vars(dynamicemb(*arguments)) for arguments in json.loads(sys.argv[2])]))"
    )
    own, empty, part = (f"tests.cli.models:{name}" for name in ("with_own_group", "empty", "collection_alone"))
    calls = [
        ["load", "--model", own, "--path", str(dumped), "--tables", f"{COLLECTION}=t0,t2", "--json"],
        ["load", "--model", empty, "--path", str(dumped), "--tables", "t1", "--tables", "t0", "--json"],
        ["load", "--model", empty, "--path", str(dumped), "--tables", "t7"],
        ["load", "--model", empty, "--path", str(dumped), "--tables", "=t1"],
        ["load", "--model", "tests.cli.models:with_another_backend", "--path", str(dumped)],
        ["load", "--model", "tests.cli.models:nothing", "--path", str(dumped)],
        ["dump", "--model", empty, "--path", str(tmp_path / "new"), "--tables", "t1"],
        ["dump", "--model", empty, "--path", str(tmp_path), "--tables", "t1"],
        # The collection itself is the model: it was at model.embeddings when it was written.
        ["load", "--model", part, "--path", str(dumped), "--collection", f"model={COLLECTION}", "--json"],
        ["load", "--model", part, "--path", str(dumped)],
        ["load", "--model", part, "--path", str(dumped), "--collection", "model=model.nothing"],
        ["load", "--model", part, "--path", str(dumped), "--collection", "model"],
    ]
    arguments = [sys.executable, "-c", code, json.dumps(environment), json.dumps(calls)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [result["code"] for result in results] == [0, 0, 1, 2, 1, 2, 0, 1, 0, 1, 1, 2], results
    loaded = [[entry["table"] for entry in json.loads(result["out"])["tables"]] for result in results[:2]]
    assert loaded == [["t0", "t2"], ["t0", "t1"]]
    assert "no dynamic table 't7'; it has model.embeddings=t0" in results[2]["err"]
    assert "asks for a process group with mpi" in results[4]["err"]
    assert results[6]["out"].startswith(f"dumped to {tmp_path / 'new'}: 1 table, 0 rows")
    assert "--overwrite" in results[7]["err"]
    moved = json.loads(results[8]["out"])["tables"]
    assert [(entry["collection"], entry["table"]) for entry in moved] == [
        ("model", f"t{number}") for number in range(3)
    ]
    assert all(entry["rows"] > 0 and entry["left_out"] == 0 for entry in moved)
    assert "collections={'model': 'model.embeddings'}" in results[9]["err"]
    assert "has no collection 'model.nothing'" in results[10]["err"]
