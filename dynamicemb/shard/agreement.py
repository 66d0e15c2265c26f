"""What one rank has found reaches all of them, so that none is left waiting in a collective."""

from __future__ import annotations

from typing import Any, Optional

import torch.distributed as dist

from dynamicemb.errors import RemoteRankError
from dynamicemb.planner.gloo import let_threads_finish_at_exit

__all__ = ["gathered", "raise_on_all_ranks"]


def gathered(value: Any, pg: Optional[dist.ProcessGroup]) -> list[Any]:
    """``value`` of every rank, on every rank; anything that can be pickled. Collective."""
    if pg is None or pg.size() == 1:
        return [value]
    let_threads_finish_at_exit(pg)
    values: list[Any] = [None] * pg.size()
    dist.all_gather_object(values, value, group=pg)
    return values


def raise_on_all_ranks(error: Optional[Exception], pg: Optional[dist.ProcessGroup], action: str) -> None:
    """Collective. ``action`` says what a rank cannot do that has an error: "make its tables".

    Raises:
        Exception: ``error``, if there is one here.
        RemoteRankError: there is one on another rank; with its message.
    """
    messages = gathered(None if error is None else str(error), pg)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RemoteRankError(f"rank {rank} of the process group cannot {action}: {message}")
