"""What a steady state may not do: wait for the device, or launch kernels on Triton's own, slow path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

__all__ = ["cached_launches_only", "steady_state"]


@contextmanager
def cached_launches_only() -> Iterator[None]:
    """Inside the block, ``kernel[grid](...)`` of any Triton kernel fails: it looks at every argument anew, and may
    compile. Launches of kernels that are compiled already go past it."""

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} was launched on Triton's own path")

    with mock.patch.object(JITFunction, "run", run):
        yield


@contextmanager
def steady_state(device: torch.device) -> Iterator[None]:
    """Inside the block, whatever makes the host wait for a CUDA device fails, and so does a launch that is not cached.
    Nothing is guarded on the CPU, which waits for nobody."""
    if device.type == "cpu":
        yield
        return
    with cached_launches_only():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
