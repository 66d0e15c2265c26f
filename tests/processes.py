"""Processes that tests start: where they find modules, and an end as a power cut would make it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

__all__ = ["kill_tree", "python_path"]


def python_path(*folders: Path | str) -> str:
    """``PYTHONPATH`` for a process that looks in ``folders`` first, and then wherever this one was told to.

    Replacing the variable would lose what lies beside an installation that cannot be changed, such as the libraries
    that a machine without pip was given in a folder.
    """
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


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
