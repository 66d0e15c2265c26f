"""A device that says it is a GPU: graphs and the profiler answer, and the host does the work."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from gpu.device import RUNS_BEFORE_CAPTURE, HostDevice, KernelRun
from gpu.limits import Ceilings
from gpu.topic import Context

__all__ = ["KERNELS", "PretendedGpu", "context"]

#: What every profiled step runs: name and seconds.
KERNELS = (
    ("_find_kernel", 3e-6),
    ("void at::native::(anonymous namespace)::DeviceRadixSortOnesweepKernel<...>", 20e-6),
    ("_gather_kernel", 40e-6),
    ("_gather_kernel", 10e-6),
)


class PretendedGpu(HostDevice):
    is_gpu = True

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        for _ in range(RUNS_BEFORE_CAPTURE):
            function()
        return function

    def profile(self, function: Callable[[int], None], steps: int) -> list[KernelRun]:
        clock = itertools.count()
        for index in range(steps):
            function(index)
        return [KernelRun(name, next(clock), seconds) for _ in range(steps) for name, seconds in KERNELS]


def context(device: HostDevice | None = None) -> Context:
    """Tiny sizes on ``device``, whose copy bandwidth is known already."""
    return Context(device or PretendedGpu(), Ceilings(copy_bytes_per_s=1e9), dry=True)
