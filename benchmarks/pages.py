"""What pages of a size cost: a first access, and reads at random that wait for each other or are under way together.

A table has a few such accesses for each row. They explain how its time for a row depends on the number of rows.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch

__all__ = ["PageCosts", "faults", "huge_share"]

#: Larger than any cache, and than what a core remembers of the places of small pages.
MEMORY_BYTES = 1 << 29
SMALL_PAGE_BYTES, HUGE_PAGE_BYTES, LINE_BYTES = 1 << 12, 2 << 20, 64
READS = 160_000
#: Reads that are under way together: about as many as one core can have.
CHAINS = 16


@numba.njit(nogil=True)
def _follow(words, chains, rounds):
    """Goes along each chain of indexes in ``words``, one step of every chain in each round."""
    for _ in range(rounds):
        for chain in range(chains.size):
            chains[chain] = words[chains[chain]]


@dataclass(frozen=True)
class PageCosts:
    """Nanoseconds on one thread.

    Attributes:
        first_access: to 4 KiB that nobody has used yet.
        dependent_read: of a random cache line whose address is in the line that was read before.
        read: of a random cache line, several of them under way together.
    """

    first_access: float
    dependent_read: float
    read: float

    @staticmethod
    def measured(huge: bool, memory_bytes: int = MEMORY_BYTES) -> PageCosts:
        """With pages of 2 MiB as far as the system gives them, or with small ones. Takes a few seconds; Linux only."""
        first_access = []
        for _ in range(3):  # memory that the machine itself has to be given first takes longer still
            words = _fresh_words(huge, memory_bytes)
            start = time.perf_counter()
            words[:: SMALL_PAGE_BYTES // 8] = 0
            first_access.append((time.perf_counter() - start) / (memory_bytes // SMALL_PAGE_BYTES))
        # One cycle through all lines.
        lines = np.random.default_rng(0).permutation(memory_bytes // LINE_BYTES) * (LINE_BYTES // 8)
        words[lines] = np.roll(lines, -1)
        dependent, together = (_seconds_by_read(words, lines, chains) for chains in (1, CHAINS))
        return PageCosts(1e9 * min(first_access), 1e9 * dependent, 1e9 * together)


def _fresh_words(huge: bool, num_bytes: int) -> np.ndarray:
    """int64, of memory that nobody has used yet, from the beginning of a huge page on."""
    mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel that has small pages only
        mapped.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(mapped, np.int64)
    return words[-words.ctypes.data % HUGE_PAGE_BYTES // 8 :][: num_bytes // 8]


def _seconds_by_read(words: np.ndarray, lines: np.ndarray, chains: int, repetitions: int = 5) -> float:
    """The fastest of a few walks along so many chains, each over lines that the others do not come to."""
    _follow(words, lines[:chains].copy(), 1)
    seconds = []
    for repetition in range(repetitions):
        first_lines = lines[:: lines.size // (chains * repetitions)][repetition::repetitions][:chains].copy()
        start = time.perf_counter()
        _follow(words, first_lines, READS // chains)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / READS


def faults() -> int:
    """Page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def huge_share(memory: torch.Tensor) -> float:
    """Of what is in use of the mapping that ``memory`` lies in, neighbours included, the part in huge pages; 0 where
    nothing is, or where nobody says."""
    place, inside, kib = memory.data_ptr() + memory.nbytes // 2, False, {"Rss": 0, "AnonHugePages": 0}
    smaps = Path("/proc/self/smaps")
    for line in smaps.read_text().splitlines() if smaps.exists() else ():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= place < int(bounds[2], 16)
        elif inside and (field := line.partition(":")[0]) in kib:
            kib[field] = int(line.split()[1])
    return kib["AnonHugePages"] / max(kib["Rss"], 1)
