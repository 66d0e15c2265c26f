"""The machine that a result belongs to: what it is, and what its memory costs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

__all__ = ["Accelerator", "Host", "MemoryCosts", "OtherLoad", "device_slug"]

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numba", "numpy", "triton")
#: What finding a key touches: 128 digests, and a cache line each of keys and scores, the latter read and written.
BUCKET_BYTES = 128 + 64 + 2 * 64
#: Words of a processor's name that tell nothing.
_NOISE = re.compile(r"\((?:r|tm)\)|@.*|\b(?:intel|amd|arm|cpu|processor|\d+-core)\b", re.IGNORECASE)


def _first_value(path: str, field: str) -> Optional[str]:
    """The value of the first line ``field : value`` of a file under /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(values, None)


def device_slug(model: str, cores: int) -> str:
    """Name of a processor for file names: ``Intel(R) Xeon(R) Processor`` with 2 cores is ``xeon-2core``."""
    words = re.findall(r"[a-z0-9]+", _NOISE.sub(" ", model).lower())
    return "-".join([*(words or ["cpu"]), f"{cores}core"])


@dataclass(frozen=True)
class Host:
    """Where and with what a result was measured.

    Attributes:
        cpu: the processor's name.
        cores: that this process may use.
        memory_gib: of the machine.
        system: operating system and Python.
        versions: of the packages that matter, by name.
        load_average: runnable processes over the minute before the run.
    """

    cpu: str
    cores: int
    memory_gib: float
    system: str
    versions: dict[str, str]
    load_average: float

    @staticmethod
    def here() -> Host:
        versions = {}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return Host(
            cpu=_first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            versions=versions,
            load_average=round(os.getloadavg()[0], 2),
        )

    @property
    def slug(self) -> str:
        return device_slug(self.cpu, self.cores)


@dataclass(frozen=True)
class Accelerator:
    """The GPU that a result belongs to.

    Attributes:
        name: as its driver calls it.
        driver: version of the driver.
        cuda: version of CUDA that torch was built for.
        memory_gib: of the GPU.
        free_gib: of those, before the run.
        multiprocessors: of the GPU.
        cache_mib: second-level cache.
    """

    name: str
    driver: str
    cuda: str
    memory_gib: float
    free_gib: float
    multiprocessors: int
    cache_mib: float

    @property
    def slug(self) -> str:
        """Name for file names: ``NVIDIA H200`` is ``nvidia-h200``."""
        return "-".join(re.findall(r"[a-z0-9]+", self.name.lower())) or "gpu"


class OtherLoad:
    """How much of the machine other processes use, from when this object is made; needs /proc/stat."""

    def __init__(self) -> None:
        self._start, self._others_before = time.perf_counter(), self._others_seconds()

    @staticmethod
    def _others_seconds() -> float:
        """CPU time of the whole machine, stolen time included, less that of this process and its ended children."""
        user, nice, system, _idle, _waiting, interrupt, soft_interrupt, stolen = (
            int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        ticks = user + nice + system + interrupt + soft_interrupt + stolen
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])

    def cores(self) -> float:
        """Cores that others kept busy since then, on average."""
        return (self._others_seconds() - self._others_before) / (time.perf_counter() - self._start)


def _fastest_seconds(function: Callable[[int], object], repetitions: int = 9) -> float:
    """Of ``function(0)``, ``function(1)`` and so on."""
    seconds = []
    for index in range(repetitions):
        start = time.perf_counter()
        function(index)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class MemoryCosts:
    """What torch's own kernels reach on this machine; expectations are made of these.

    Attributes:
        random_bytes_per_s: read plus written, rows of 256 bytes copied from random places of 256 MiB.
        sorted_ids_per_s: 64-bit ids that ``torch.unique`` deduplicates with their inverse, the known cost of a sort.
    """

    random_bytes_per_s: float
    sorted_ids_per_s: float

    @staticmethod
    def measured(ids: int = 65_536) -> MemoryCosts:
        """In ``torch.get_num_threads()`` threads; takes about a second."""
        table, picked = torch.ones(2**20, 64), torch.empty(ids, 64)
        batches = [torch.randint(table.shape[0], (ids,)) for _ in range(9)]
        return MemoryCosts(
            random_bytes_per_s=2
            * picked.nbytes
            / _fastest_seconds(lambda index: torch.index_select(table, 0, batches[index], out=picked)),
            sorted_ids_per_s=ids / _fastest_seconds(lambda index: torch.unique(batches[index], return_inverse=True)),
        )

    def forward_seconds(self, ids: int, unique: float, row_bytes: int) -> float:
        """A training lookup without misses: one sort, a bucket for each distinct id, a row for each id."""
        sort = ids / self.sorted_ids_per_s
        find = unique * BUCKET_BYTES / self.random_bytes_per_s
        gather = (unique + ids) * row_bytes / self.random_bytes_per_s
        return sort + find + gather

    def backward_seconds(self, ids: int, unique: float, row_bytes: int, state_bytes: int) -> float:
        """An update: each gradient read once, each distinct row and its state read and written."""
        return (ids * row_bytes + 2 * unique * (row_bytes + state_bytes)) / self.random_bytes_per_s
