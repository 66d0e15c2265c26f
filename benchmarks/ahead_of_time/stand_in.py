"""A driver that stands in for CUDA's: kernels are compiled and looked up as on a GPU, and launched into nothing.

Everything between ``kernel[grid](...)`` and the driver is Triton's own: how arguments are looked at, what the key of a
compiled kernel is, where it is kept. So what is compiled with the stand-in is what a launch on such a GPU will find.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from dynamicemb.kernels import launch

__all__ = ["Counts", "stand_in"]

#: Of an H100; a kernel that asks for more than a program may have is refused as there.
_DEVICE = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}


@dataclass
class Counts:
    """What happened while the stand-in was there: kernels by name.

    Attributes:
        compiled: that were in no cache.
        found: that were in the cache on disk.
        launches: of either.
    """

    compiled: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    launches: int = 0


class _Utilities:
    """Of a driver: what Triton asks about the device, and loads onto it."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return _DEVICE

    @staticmethod
    def load_binary(name: str, binary: bytes, shared_bytes: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and threads that a program may have."""
        return 1, 1, 0, 0, 1024


class _Driver:
    """The device with number 0, of a given compute capability."""

    utils = _Utilities()

    def __init__(self, compute_capability: int, counts: Counts) -> None:
        self._target, self._counts = GPUTarget("cuda", compute_capability, 32), counts

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launched(*arguments: Any) -> None:
            self._counts.launches += 1

        return launched


@contextmanager
def stand_in(compute_capability: int) -> Iterator[Counts]:
    """Inside the block there is such a GPU; tensors may be on any device, and nothing is read or written.

    A kernel that this process has compiled or launched before is not looked up on disk again.
    """
    counts = Counts()

    def compilation(*, metadata: dict[str, Any], cache_hit: bool, **others: Any) -> None:
        (counts.found if cache_hit else counts.compiled).append(metadata["name"])

    before, listener = driver._active, knobs.compilation.listener
    driver.set_active(_Driver(compute_capability, counts))
    knobs.compilation.listener = compilation
    try:
        with mock.patch.object(launch, "_compute_capability", return_value=compute_capability):
            yield counts
    finally:
        driver._active = before
        knobs.compilation.listener = listener
