"""Whether work is being recorded in a CUDA graph, to be done later and again, instead of being done."""

from __future__ import annotations

import torch

__all__ = ["is_captured"]


def is_captured(device: torch.device) -> bool:
    """Whether what is launched on the current stream of ``device`` becomes part of a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks for that of the current device
        return torch.cuda.is_current_stream_capturing()
