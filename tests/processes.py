"""Processes that tests start: where they find modules and each other, and an end as a power cut would make it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

__all__ = [
    "C10D_ERRORS_ONLY", "TIMEOUT_SECONDS", "command_line", "kill_tree", "processes", "python_path", "torchrun",
]  # fmt: skip

#: After which a process that a test waits for has hung. It may have every CPU kernel to compile, which has taken 154 s
#: on a machine that had other work.
TIMEOUT_SECONDS = 900
#: Variables for ranks whose stderr a test reads. Where no name service answers, c10d warns of each connection that it
#: does not know the other side's name, which is about the machine, and not about us.
C10D_ERRORS_ONLY = {"TORCH_CPP_LOG_LEVEL": "ERROR"}


def torchrun(ranks: int) -> list[str]:
    """A command line up to the program: so many ranks of this machine, which meet on its loopback.

    Without the address torchrun takes the name of the machine, which not every machine can resolve.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    return [sys.executable, *launcher, "--nproc-per-node", str(ranks)]


def python_path(*folders: Path | str) -> str:
    """``PYTHONPATH`` for a process that looks in ``folders`` first, and then wherever this one was told to.

    Replacing the variable would lose what lies beside an installation that cannot be changed, such as the libraries
    that a machine without pip was given in a folder.
    """
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kills ``process`` and its descendants, which may be in sessions of their own. Waits for the process."""
    parents = {pid: parent for pid in processes() if (parent := _parent(pid)) is not None}
    family = {process.pid}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def processes() -> list[int]:
    """All that this one can see."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None


def command_line(pid: int) -> list[str]:
    """What a process was called with; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []
