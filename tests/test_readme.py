"""The README's code runs as it stands, and its facts are those of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import TIMEOUT_SECONDS, python_path, torchrun

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
QUICK_START, OPTIONS, CHECKPOINTS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _run(code: str, directory: Path, ranks: int = 0) -> str:
    """What the code prints; with ``ranks``, in so many under torchrun."""
    script = directory / "from_readme.py"
    script.write_text(code)
    # Port 0: any that is free, since other tests may run beside this one.
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    finished = subprocess.run(
        [*(torchrun(ranks) if ranks else [sys.executable]), str(script)],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_the_quick_start_is_short():
    lines = [line for line in QUICK_START.splitlines() if line.strip()]
    assert len(lines) <= 20


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_quick_start_runs(tmp_path, ranks):
    output = _run(QUICK_START, tmp_path, ranks)
    assert output.count("TableStatistics(size=3, capacity=100096, ") == max(ranks, 1)


def test_the_options_run(tmp_path):
    imports = QUICK_START.split("\n\n")[0]
    assert _run(f"{imports}\n{OPTIONS}\nprint('built')", tmp_path) == "built\n"


@pytest.mark.slow
def test_the_checkpoints_run(tmp_path):
    code = f"{QUICK_START}\n{CHECKPOINTS}\nprint(table_statistics(model)['item'])"
    assert _run(code, tmp_path, ranks=2).count("TableStatistics(size=3, capacity=100096, ") == 4
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["delta1", "full"]


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
