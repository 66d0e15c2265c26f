"""Processes that tests start find what this one finds: PYTHONPATH is added to, not replaced."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import python_path

ROOT = Path(__file__).resolve().parents[1]
#: Environments that are to hold nothing but what was installed into them.
ISOLATED = {"tests/matrix.py", "tests/test_installation.py"}


def _values(tree: ast.AST) -> Iterator[ast.expr]:
    """What is given as PYTHONPATH: in dictionaries and subscripts, and by keyword."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (value for key, value in zip(node.keys, node.values) if _names_it(key))
        elif isinstance(node, ast.Assign):
            yield from [node.value for to in node.targets if isinstance(to, ast.Subscript) and _names_it(to.slice)]
        elif isinstance(node, ast.keyword) and node.arg == "PYTHONPATH":
            yield node.value


def _names_it(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value == "PYTHONPATH"


def test_what_was_on_the_path_stays_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/bundle")
    assert python_path(tmp_path, "/second").split(os.pathsep) == [str(tmp_path), "/second", "/bundle"]
    monkeypatch.delenv("PYTHONPATH")
    assert python_path(tmp_path) == str(tmp_path), "an empty entry would be the current folder"


def test_nobody_replaces_the_path() -> None:
    """A machine without pip is given its libraries on PYTHONPATH: a process that is started without it lacks them."""
    replaced, kept = [], 0
    for folder in ("tests", "examples", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            for value in _values(ast.parse(file.read_text())) if name not in ISOLATED else ():
                text = ast.unparse(value)
                inherits = "python_path(" in text or "os.environ" in text
                kept += inherits
                replaced += [] if inherits else [f"{name}:{value.lineno}"]
    assert replaced == [], "start with tests.processes.python_path"
    assert kept >= 5
