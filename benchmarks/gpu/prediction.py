"""What a kernel should take on a GPU: its bytes at the speed of the memory, or its chain of loads, whichever is longer.

A kernel that waits for memory has as many bytes under way as its resident warps ask for at a time. Each warp works on
one tile after the other, and a tile is a chain of loads of which each needs what the one before has brought. So the
least time of a kernel with ``tiles`` tiles is

    tiles / (multiprocessors * resident programs) * loads of the chain * latency

and no bandwidth helps against it. Registers decide about residency; they are those of the machine code that ``make
aot`` has compiled, by the rule of :mod:`dynamicemb.kernels.occupancy`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from gpu import traffic
from gpu.traffic import Traffic

__all__ = ["H100", "H200", "Chain", "Compiled", "Device", "Prediction", "compiled"]

#: Both have this architecture.
ARCHITECTURE = "sm_90"


@dataclass(frozen=True)
class Chain:
    """The loads that a kernel waits for, one after the other.

    Attributes:
        entries: that it works on, all programs together.
        loads: of a tile, each of which depends on the one before and comes from memory; what every tile reads (counts,
            geometry, addresses) is in the cache and not counted.
    """

    entries: float
    loads: int


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code.

    Attributes:
        tile: entries of a tile.
        warps: of a program.
        resident_warps: that a multiprocessor keeps at a time.
        registers: of a thread.
    """

    tile: int
    warps: int
    resident_warps: int
    registers: int

    @property
    def resident_programs(self) -> int:
        return self.resident_warps // self.warps


@dataclass(frozen=True)
class Prediction:
    """Of one kernel, in seconds: by its bytes, and by its chain of loads, each with the start of a kernel.

    Attributes:
        by_memory: what is moved at the limits of the memory.
        by_latency: what the chain takes; 0 where it is not known or not the limit by far.
    """

    by_memory: float
    by_latency: float

    @property
    def seconds(self) -> float:
        return max(self.by_memory, self.by_latency)

    @property
    def limit(self) -> str:
        """In a word."""
        return "latency" if self.by_latency > self.by_memory else "bytes"


@dataclass(frozen=True)
class Device:
    """Limits of a GPU.

    Attributes:
        name: of the GPU.
        copy_bytes_per_second: read plus written by a copy from device to device.
        random_reads_per_second: reads of up to 64 bytes at random places.
        sort_pass_seconds: one pass of a radix sort of a million pairs, which is too short to be limited by memory.
        launch_seconds: from the end of one kernel to the work of the next one.
        latency_seconds: of a load that no cache has.
        multiprocessors: of the GPU.
    """

    name: str
    copy_bytes_per_second: float
    random_reads_per_second: float
    sort_pass_seconds: float
    launch_seconds: float
    latency_seconds: float = 0.7e-6
    multiprocessors: int = 132

    def seconds(self, work: Traffic) -> float:
        """Least time of one kernel by what it moves."""
        streamed, seconds = work.streamed_bytes, self.launch_seconds
        for width, count in work.accesses.items():
            if width <= 64:
                seconds += count / self.random_reads_per_second
            else:
                streamed += width * count
        seconds += sum(sort.key_bytes * 8 // traffic.RADIX_BITS for sort in work.sorts) * self.sort_pass_seconds
        return seconds + streamed / self.copy_bytes_per_second

    def predicted(self, work: Traffic, chain: Optional[Chain] = None, code: Optional[Compiled] = None) -> Prediction:
        """Both limits of a kernel; by its bytes alone where its chain or its machine code is not known."""
        if chain is None or code is None:
            return Prediction(self.seconds(work), 0.0)
        tiles = chain.entries / code.tile
        turns = max(1.0, tiles / (self.multiprocessors * code.resident_programs))
        return Prediction(self.seconds(work), self.launch_seconds + turns * chain.loads * self.latency_seconds)


H200 = Device("H200", 4.3e12, 46e9, 20e-6, 2e-6)
H100 = Device("H100", 2.8e12, 32e9, 20e-6, 2e-6)


def _by_age(results: Path) -> list[Path]:
    """Results of ``make aot``, the newest first; of one day, those of the Triton that is pinned, then of newer ones."""

    def rank(file: Path) -> tuple[str, bool, tuple[int, ...]]:
        version = re.findall(r"triton-([\d.]+)-", file.stem)[0]
        return file.stem[-10:], version == _pinned_triton(), tuple(map(int, version.split(".")))

    return sorted(results.glob("aot-*.json"), key=rank, reverse=True)


def _pinned_triton() -> str:
    requirements = Path(__file__).parents[2] / "requirements" / "base.txt"
    return re.findall(r"^triton==([\d.]+)", requirements.read_text(), re.MULTILINE)[0]


@functools.cache
def _kernels(file: Path) -> dict[str, Any]:
    kernels: dict[str, Any] = json.loads(file.read_text())["kernels"]
    return kernels


def compiled(kernel: str, setting: Mapping[str, Any], results: Path) -> Optional[Compiled]:
    """The machine code of ``kernel`` where its constants and options are those of ``setting``, as far as it has them.

    Args:
        kernel: its name.
        setting: constants and options by name; what the kernel does not have is passed over.
        results: folder of the results.

    Returns:
        What the newest results say that have it; None if none has.
    """
    for file in _by_age(results):
        entry = _kernels(file).get(kernel, {"configurations": []})
        for configuration in entry["configurations"]:
            have = {**entry["common"], **configuration["setting"]}
            if ARCHITECTURE in configuration and all(have.get(name, value) == value for name, value in setting.items()):
                code = configuration[ARCHITECTURE]
                tile = have.get("ROWS", have.get("TILE", have.get("LOOK", 1)))
                return Compiled(tile, code["warps"], code["resident_warps"], code["registers"])
    return None
