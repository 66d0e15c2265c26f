"""Processes that may hang, crash or leave others behind: started apart, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["adopt_orphans", "end", "end_orphans", "start", "tail"]

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on, what a dead process leaves behind belongs to this process, which can then find and end it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a process group of its own; both outputs go to the end of ``log``."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its descendants, in whatever group they are, and waits for it."""
    family = _family(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def end_orphans(known: Sequence[int]) -> None:
    """Kills the children of this process that are not ``known``: what ended processes have left behind."""
    orphans = [pid for pid, parent in _parents().items() if parent == os.getpid() and pid not in known]
    for orphan in orphans:
        for pid in _family(orphan):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(orphan, 0)


def _family(pid: int) -> set[int]:
    parents, family = _parents(), {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return family


def _parents() -> dict[int, int]:
    """The parent of every process."""
    result = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
                result[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return result


def tail(log: Path, num_bytes: int = 1500) -> str:
    """The end of a log."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read().decode(errors="replace")
