"""A checkpoint with more files than a process may have open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.tables import random_rows, record_of, write_native

TABLES = 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = record_of(4, "float32", "sgd")
    write_native(tmp_path / "many", {("model", f"t{number}"): (record, random_rows(3, 4, "float32", "sgd"))
                                     for number in range(TABLES)})  # fmt: skip
    return tmp_path / "many"


_OPEN = """
import resource, sys
from dynamicemb import CheckpointError
from dynamicemb.checkpoint.files.reader import Checkpoint

folder, soft, hard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    with Checkpoint(folder) as checkpoint:
        print(len(checkpoint.tables), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except CheckpointError as error:
    print(error)
"""


def opened(folder: Path, soft: int, hard: int) -> str:
    """What a process with a limit of ``soft`` open files says, which may raise it to ``hard``."""
    command = [sys.executable, "-c", _OPEN, str(folder), str(soft), str(hard)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_limit_is_raised_as_far_as_the_system_lets(folder: Path) -> None:
    assert opened(folder, 64, 500) == f"{TABLES} 500"
    message = opened(folder, 64, 64)
    assert "Too many open files" in message and "raise the limit, ulimit -n" in message
    assert "restore the file" not in message
