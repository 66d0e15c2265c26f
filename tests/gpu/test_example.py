"""The example, started as its page says, end to end on a GPU beside the CPU: the same tables, the same model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import tolerances
from tests.gpu.scale import SCALES, Scale
from tests.processes import TIMEOUT_SECONDS, python_path, torchrun

ROOT = Path(__file__).resolve().parents[2]
#: What happened to the keys of a table: decided by the ids alone, so both engines must say the same.
COUNTED = ("size", "capacity", "hits", "misses", "evicted", "refused")


def start(gpus: str, summary: Path, rows: int) -> subprocess.Popen[str]:
    """The demo in one process of torchrun, on the GPUs with these numbers; none: on the CPU."""
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT), "CUDA_VISIBLE_DEVICES": gpus}
    # Half of the tables are full of 512 rows after a few thousand rows of the log.
    arguments = ["--rows", str(rows), "--capacity", "512", "--score", "lfu", "--summary", str(summary)]
    return subprocess.Popen(
        [*torchrun(1), "examples/train_criteo.py", *arguments],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], summary: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-4000:]
    return json.loads(summary.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_the_example(scale: Scale, tmp_path: Path) -> None:
    rows, gpus, least_auc = (20_000, "0", 0.65) if scale.full else (4_000, "", 0.5)
    paths = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    processes = [start(numbers, path, rows) for numbers, path in zip(("", gpus), paths)]
    expected, actual = (finished(process, path) for process, path in zip(processes, paths))
    assert expected["engine"] == "cpu" and actual["engine"] == ("triton" if scale.full else "cpu")
    assert least_auc < actual["auc"] < 1
    for name in ("auc", "log_loss"):
        assert actual[name] == pytest.approx(expected[name], abs=tolerances.TRAINED_MODEL_ATOL)
    for name, table in expected["tables"].items():
        assert {field: actual["tables"][name][field] for field in COUNTED} == {field: table[field] for field in COUNTED}
    assert any(table["evicted"] for table in actual["tables"].values())
