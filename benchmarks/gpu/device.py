"""The one place that talks to the GPU as such: clock, graphs, profiler, memory, names and versions.

:class:`HostDevice` stands in for it in a dry run, where the CPU engine works on host tensors.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from host import Accelerator

__all__ = ["CudaDevice", "Device", "HostDevice", "KernelRun", "NeedsGpuError"]

GIB = 2**30
#: Runs of a function before it is captured: kernels get compiled and libraries take their workspaces.
RUNS_BEFORE_CAPTURE = 3


class NeedsGpuError(Exception):
    """There is no such thing on the host."""


@dataclass(frozen=True)
class KernelRun:
    """One kernel, copy or fill that ran on the device; times in seconds, the start from any origin."""

    name: str
    start: float
    seconds: float


class Device(ABC):
    """Where the work is done.

    Attributes:
        torch_device: of all tensors.
        is_gpu: whether graphs and the profiler are there.
    """

    torch_device: torch.device
    is_gpu: bool

    @abstractmethod
    def mark(self) -> Any:
        """A point in the order of the work issued so far. Does not synchronise."""

    @abstractmethod
    def seconds_between(self, first: Any, second: Any) -> float:
        """Time from one mark to a later one, once :meth:`synchronize` has been called after both."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for all work issued so far."""

    @abstractmethod
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """A function that does again, in one launch, what ``function`` does on the device.

        ``function`` runs :data:`RUNS_BEFORE_CAPTURE` times before, and those runs count.

        Raises:
            NeedsGpuError: on the host.
        """

    @abstractmethod
    def profile(self, function: Callable[[int], None], steps: int) -> list[KernelRun]:
        """Everything that ``function(0)`` to ``function(steps - 1)`` run on the device, in the order of their starts.

        Raises:
            NeedsGpuError: on the host.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that can be allocated now. Synchronises, and gives cached memory back."""

    @abstractmethod
    def facts(self) -> Accelerator:
        """What it is."""


class CudaDevice(Device):
    """The current CUDA device, in its current stream."""

    is_gpu = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return float(first.elapsed_time(second)) * 1e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        # Work before a capture has to be outside the stream that captures, as torch's page on graphs says.
        side = torch.cuda.Stream(self.torch_device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(RUNS_BEFORE_CAPTURE):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def profile(self, function: Callable[[int], None], steps: int) -> list[KernelRun]:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for index in range(steps):
                function(index)
            self.synchronize()
        runs = [
            KernelRun(event.name, event.time_range.start * 1e-6, event.time_range.elapsed_us() * 1e-6)
            for event in profiler.events() or ()
            # Ranges that libraries annotate span kernels that are in the list themselves.
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        return sorted(runs, key=lambda run: run.start)

    def free_bytes(self) -> int:
        self.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def facts(self) -> Accelerator:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return Accelerator(
            name=properties.name,
            driver=_driver_version(),
            cuda=str(torch.version.cuda),
            memory_gib=round(properties.total_memory / GIB, 1),
            free_gib=round(self.free_bytes() / GIB, 1),
            multiprocessors=properties.multi_processor_count,
            cache_mib=round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        )


def _driver_version() -> str:
    """As ``nvidia-smi`` says, or else the kernel module, or else the newest CUDA that the driver can run."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        if lines:
            return lines[0]
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return next(word for word in Path("/proc/driver/nvidia/version").read_text().split() if word.count(".") == 2)
    except (OSError, StopIteration):
        return "unknown"


class HostDevice(Device):
    """Host tensors and the host's clock, to run everything but the GPU's own parts without one."""

    is_gpu = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, first: float, second: float) -> float:
        return max(second - first, 1e-9)

    def synchronize(self) -> None:
        return

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        raise NeedsGpuError("CUDA graphs need a GPU")

    def profile(self, function: Callable[[int], None], steps: int) -> list[KernelRun]:
        raise NeedsGpuError("the profiler's view of kernels needs a GPU")

    def free_bytes(self) -> int:
        # SC_AVPHYS_PAGES would leave out what the page cache gives back when it is asked to.
        (kilobytes,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(kilobytes) * 1024

    def facts(self) -> Accelerator:
        memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
        free_gib = round(self.free_bytes() / GIB, 1)
        return Accelerator("dry run on the host", "none", "none", memory_gib, free_gib, 0, 0.0)
