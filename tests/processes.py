"""Ends a process and everything that it has started, wherever that has put itself: as a power cut would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

__all__ = ["kill_tree"]


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kills ``process`` and its descendants, which may be in sessions of their own. Waits for the process."""
    parents = {pid: parent for pid in _processes() if (parent := _parent(pid)) is not None}
    family = {process.pid}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None
