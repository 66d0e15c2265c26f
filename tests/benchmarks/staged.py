"""Stages of the quarter of an hour in a process of their own, for tests, and the findings that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quarter_hour.journal import read_lines

from tests.benchmarks.conftest import BENCHMARKS
from tests.processes import TIMEOUT_SECONDS, python_path

__all__ = ["ROOT", "driver", "found", "outcomes", "started"]

ROOT = BENCHMARKS.parent
#: Stages in a process of their own: whatever is no child of theirs they take for something left behind.
DRIVER = """
import atexit, os, signal, sys, time
from pathlib import Path
from quarter_hour.__main__ import run
from quarter_hour.journal import Journal
from quarter_hour.processes import adopt_orphans
from quarter_hour.snapshots import Snapshots
from quarter_hour.stages import Session, Stage

SAY = '''
import json, os, signal, sys, time
def say(name, outcome="ok"):
    with open(sys.argv[-1], "a") as file:
        file.write(json.dumps({{"name": name, "outcome": outcome}}) + "\\\\n")
'''

def stage(name, code, findings=(), **limits):
    def command(pending, left):
        return [sys.executable, "-c", SAY + code, *pending]
    return Stage(name, command, findings, **limits)

out, results = Path("out"), Path("results")
for folder in (out, results, Path("cache")):
    folder.mkdir()
adopt_orphans()
journal = Journal(out / "findings.jsonl", 7)
session = Session(journal, results, Path.cwd(), {{}}, time.monotonic() + {seconds}, Path("cache"))
snapshots = Snapshots(results, out / "part.tar.gz", 0.1)
{before}
try:
    run([{stages}], [{beside}], session)
finally:
    snapshots.finish()
"""


def driver(stages: str, seconds: float = 120, beside: str = "", before: str = "") -> list[str]:
    return [sys.executable, "-c", DRIVER.format(stages=stages, seconds=seconds, beside=beside, before=before)]


def started(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": python_path(ROOT, BENCHMARKS)}
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True)


def found(
    folder: Path, stages: str, seconds: float = 120, beside: str = "", before: str = ""
) -> dict[str, dict[str, Any]]:
    """Findings of these stages by name, which are the same in the file and on the terminal."""
    process = started(folder, driver(stages, seconds, beside, before))
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines == read_lines(folder / "out" / "findings.jsonl")[0]
    assert all(line["part"] == 7 for line in lines)
    return {line["name"]: line for line in lines}


def outcomes(findings: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: finding["outcome"] for name, finding in findings.items()}
