"""Tests as findings of a stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from quarter_hour import parts
from quarter_hour.journal import read_lines

from tests.benchmarks.staged import outcomes, started
from tests.processes import TIMEOUT_SECONDS

TESTS = """
import pytest
@pytest.mark.parametrize("number", [1, 2, 3])
def test_first(number): assert number > 1
def test_second(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not here")
def test_third(): pass
"""


def test_tests_are_reported_as_they_end(tmp_path: Path) -> None:
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "quarter_hour.pytest_findings", "-p", "no:cacheprovider"]
    process = started(tmp_path, [*command, "--each-test", "2", "--findings", "lines.jsonl"])
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1, output
    records = {record["name"]: record for record in read_lines(tmp_path / "lines.jsonl")[0]}
    assert outcomes(records) == {
        f"test_{file}.py::test_{name}": outcome
        for file in "ab"
        for name, outcome in {"first[2]": "ok", "first[3]": "ok", "second": "failed", "third": "skipped"}.items()
    }
    assert "one is not two" in records["test_a.py::test_second"]["reason"]
    assert "not here" in records["test_a.py::test_third"]["reason"]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "worker"])
def test_a_module_that_cannot_be_imported_is_a_finding(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module")
    (tmp_path / "test_b.py").write_text("import pytest; pytest.skip('not here', allow_module_level=True)")
    (tmp_path / "test_c.py").write_text("def test_one(): pass")
    records = records_of(tmp_path, workers)
    assert outcomes(records) == {"test_a.py": "failed", "test_b.py": "skipped", "test_c.py::test_one": "ok"}
    assert "no_such_module" in records["test_a.py"]["reason"]
    assert "not here" in records["test_b.py"]["reason"]


def records_of(folder: Path, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """First findings by name of the tests in ``folder``, run as a stage runs them."""
    command = parts._tests("name", arguments, 60).command((), 60.0)
    process = started(folder, [*command, "--findings", "lines.jsonl"])
    process.communicate(timeout=TIMEOUT_SECONDS)
    records = read_lines(folder / "lines.jsonl")[0]
    return {record["name"]: record for record in reversed(records)}


BREAKS = """
import os, sys, types
class Cuda:
    broken = False
    def is_initialized(self): return True
    def synchronize(self):
        if self.broken: raise RuntimeError("an illegal memory access was encountered")
cuda = Cuda()
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
def test_first(): assert 1 == 2, "one is not two"
def test_second():
    assert os.environ["PYTEST_XDIST_WORKER"] == "gw0", "nothing was wrong with the worker of the first"
    cuda.broken = True
    raise RuntimeError("illegal access of the second")
def test_third(): cuda.synchronize()
def test_fourth(): cuda.synchronize()
"""


def test_a_worker_whose_gpu_is_broken_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(BREAKS)
    records = records_of(tmp_path, ["-n", "1"])
    assert outcomes(records) == {
        "test_a.py::test_first": "failed", "test_a.py::test_second": "failed", "test_a.py::test_third": "ok",
        "test_a.py::test_fourth": "ok",
    }  # fmt: skip
    assert "illegal access of the second" in records["test_a.py::test_second"]["reason"]
