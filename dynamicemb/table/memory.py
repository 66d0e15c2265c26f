"""How much memory a device has, and the error of an allocation that it has no room for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from dynamicemb.errors import OutOfMemoryError

__all__ = ["Memory", "allocating", "memory_of"]

#: Where limits of the groups of processes are: (file system, the limit's file, the file of what is in use).
_CGROUP_FILES = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
#: Which groups this process is in.
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes that a device has in all, and those that are free."""

    total: int
    free: int


def memory_of(device: torch.device) -> Memory:
    """The memory of ``device``; of the CPU, what this process may use: the machine's, or its container's if less."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    page = os.sysconf("SC_PAGE_SIZE")
    memory = Memory(page * os.sysconf("SC_PHYS_PAGES"), _available() or page * os.sysconf("SC_AVPHYS_PAGES"))
    for limit in _cgroup_limits():
        memory = Memory(min(memory.total, limit.total), min(memory.free, limit.free))
    return memory


def _available() -> Optional[int]:
    """What Linux could give without swapping; more than what is unused, as caches are given up."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_limits() -> Iterator[Memory]:
    """The limits of this process's group and of all groups that contain it, in either version of cgroups."""
    try:
        entries = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    paths = {controllers: path for _, controllers, path in entries if controllers in ("", "memory")}
    for controllers, (root, limit, usage) in zip(("", "memory"), _CGROUP_FILES):
        folder = root / paths.get(controllers, "/").lstrip("/")
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            try:
                total, used = int((place / limit).read_text()), int((place / usage).read_text())
            except (OSError, ValueError):  # no such file, or "max"
                continue
            yield Memory(total, max(0, total - used))


@contextmanager
def allocating(what: str, num_bytes: int, device: torch.device, remedy: str) -> Iterator[None]:
    """Inside it, an allocation that fails raises an error that says what it was for.

    Args:
        what: begins the message: "table 'item': memory for 512 more rows".
        num_bytes: all that is to be allocated.
        device: where.
        remedy: ends the message.

    Raises:
        OutOfMemoryError: in place of what torch raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError, TypeError) as error:
        if not _is_out_of_memory(error):
            raise
        memory = memory_of(device)
        raise OutOfMemoryError(
            f"{what}, {num_bytes} bytes ({_gib(num_bytes)}), cannot be allocated on {device}, which has "
            f"{_gib(memory.total)} in all and {_gib(memory.free)} free; {remedy}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # What torch says of the CPU's memory, and of sizes that no 64-bit number holds.
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory", "verflow"))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.4g} GiB"
