"""Runs scenarios at toy size with the Triton engine, in Triton's interpreter and a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynamicemb.kernels.engine import ENGINE_VARIABLE
from tests.gpu.scale import INTERPRETED
from tests.interpreter import needs_interpreter
from tests.processes import TIMEOUT_SECONDS

HERE = Path(__file__).parent
#: The narrowest rows with every optimizer, policy and dtype.
SCENARIOS = (f"{HERE / 'test_engines.py'}", "-k", "test_every_pair_of_choices and toy")


@pytest.mark.slow
@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason="this process is Triton's interpreter already")
def test_scenarios() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop(ENGINE_VARIABLE, None)
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SCENARIOS],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert process.returncode == 0, f"{process.stdout[-6000:]}\n{process.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed, \d+ deselected", process.stdout)
    assert passed and int(passed[1]) >= 5, process.stdout[-2000:]
