"""The memory checker and the race checker of CUDA's ``compute-sanitizer`` over a small run of every kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import sanitized
from tests.gpu.scale import INTERPRETED
from tests.kernels.aot import kernels

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 280
#: Exit code of the checker when it has found something.
FOUND = 86
#: What the checker says of a machine on which it cannot work.
UNSUPPORTED = "Device not supported"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")

RUNS = {"memcheck": ("memcheck", ()), "racecheck": ("racecheck", ()), "planted": ("memcheck", ("--plant",))}
needs_sanitizer = pytest.mark.skipif(
    SANITIZER is None, reason="no compute-sanitizer on PATH, nor in /usr/local/cuda/bin"
)


def start(sanitizer: str, tool: str, *arguments: str) -> subprocess.Popen[str]:
    """The small run under a checker."""
    # Errors of API calls are not asked for: libraries try some and handle what they return.
    checks = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    if tool == "racecheck":  # shared memory of our kernels; those of torch are not ours to check, and many
        checks += [option for name in sorted(kernels()) for option in ("--kernel-name", f"kernel_substring={name}")]
    return subprocess.Popen(
        [sanitizer, *checks, sys.executable, "-m", "tests.gpu.sanitized", *arguments],
        cwd=ROOT,
        # Without torch's allocator a tensor is an allocation, and the checker knows where it ends.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    if UNSUPPORTED in output:
        pytest.skip(f"compute-sanitizer: {UNSUPPORTED.lower()}")
    return output


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All runs at once: each of them spends its time on one processor."""
    assert SANITIZER is not None
    started = {name: start(SANITIZER, tool, *arguments) for name, (tool, arguments) in RUNS.items()}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.gpu
@needs_sanitizer
@pytest.mark.parametrize("name", ["memcheck", "racecheck"])
def test_nothing_is_found(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    process = processes[name]
    output = output_of(process)
    assert process.returncode == 0, output[-6000:]
    assert sanitized.FINISHED in output and "0 errors" in output, output[-6000:]


@pytest.mark.gpu
@needs_sanitizer
def test_what_is_planted_is_found(processes: dict[str, subprocess.Popen[str]]) -> None:
    process = processes["planted"]
    output = output_of(process)
    assert process.returncode != 0, output[-6000:]
    assert "Invalid __global__ write" in output and "_write_past_the_end" in output, output[-6000:]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="takes minutes there")
def test_the_run_at_toy_size(tmp_path: Path) -> None:
    """Under a checker that only starts what it is given."""
    checker = tmp_path / "compute-sanitizer"
    checker.write_text('#!/bin/sh\nwhile [ "$1" != "$EXECUTABLE" ]; do shift; done\nexec "$@"\n')
    checker.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXECUTABLE", sys.executable)
        process = start(str(checker), "racecheck", "--device", "cpu")
    assert "kernel_substring=_find_kernel" in str(process.args)
    assert sanitized.FINISHED in output_of(process)
    assert process.returncode == 0
