"""What the threads of gloo need from a process that may be about to end."""

from __future__ import annotations

import time
from typing import Optional

import torch.distributed as dist

__all__ = ["let_go"]

_SECONDS = 0.05


def let_go(process_group: Optional[dist.ProcessGroup]) -> None:
    """Gives gloo's thread the time to let go of what a collective has worked on. Called after the last of several.

    That happens some time after the collective has returned, and takes Python's lock. A process that ends before the
    thread gets it is aborted (torch 2.13), as one may that saves its tables, or prints their statistics, last.
    """
    if process_group is not None and process_group.size() > 1:
        time.sleep(_SECONDS)
