"""Processes that may hang, crash or leave others behind: started apart, and ended with all that they have started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["adopt_orphans", "end", "kill_orphans", "reap", "start", "tail"]

_PR_SET_CHILD_SUBREAPER = 36
_REAP_POLL_SECONDS = 0.02
#: Has the command that follows killed when the thread that started it ends (PR_SET_PDEATHSIG), where the system can. A
#: function between fork and exec would do the same, but may wait forever for a lock that another thread holds.
_WITH_PARENT = (
    sys.executable, "-ISc",
    "import ctypes, os, signal, sys\n"
    "prctl = getattr(ctypes.CDLL(None), 'prctl', None)\n"
    "if prctl: prctl(1, signal.SIGKILL, 0, 0, 0)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])",
)  # fmt: skip


def adopt_orphans() -> None:
    """From now on, what a dead process leaves behind belongs to this process, which can then find and end it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a process group of its own, killed with the thread that started it; both outputs go to the end of ``log``."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            [*_WITH_PARENT, *command], cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Kills the process and its descendants, in whatever group they are, and waits for it, ``seconds`` at most: one
    that is inside a driver's call does not end before the call."""
    family = _family(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _kill(family)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def kill_orphans(known: Sequence[int]) -> list[int]:
    """Kills the children of this process that are not ``known``, what ended processes have left behind, and returns
    them, to be reaped."""
    orphans = [pid for pid, parent in _parents().items() if parent == os.getpid() and pid not in known]
    for orphan in orphans:
        _kill(_family(orphan))
    return orphans


def reap(children: Sequence[int], seconds: float) -> None:
    """Waits for killed children of this process, ``seconds`` at most for all of them."""
    limit = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < limit:
                time.sleep(_REAP_POLL_SECONDS)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


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
