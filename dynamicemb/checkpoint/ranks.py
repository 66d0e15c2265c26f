"""The ranks that work on a checkpoint together: what fails on one of them fails on all, and none is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, TypeVar

import torch.distributed as dist

from dynamicemb.errors import RemoteRankError
from dynamicemb.planner.gloo import let_threads_finish_at_exit

__all__ = ["Ranks"]

_Result = TypeVar("_Result")


class Ranks:
    """The ranks of a process group.

    Args:
        pg: the group; None: this process alone.
    """

    def __init__(self, pg: Optional[dist.ProcessGroup]) -> None:
        let_threads_finish_at_exit(pg)
        self._pg = pg
        self.rank = 0 if pg is None else pg.rank()
        self.size = 1 if pg is None else pg.size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._pg)
        return values

    def together(self, action: Callable[[], _Result]) -> list[_Result]:
        """Calls ``action`` on every rank and returns the results of all of them, on each.

        Raises:
            Exception: what ``action`` raised here; where it only failed on other ranks,
                :class:`~dynamicemb.errors.RemoteRankError` with the message of the first of them.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as failure:
            error = failure
        outcomes = self.gather((result, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise RemoteRankError(f"rank {rank} of the process group failed: {message}")
        return [outcome for outcome, _ in outcomes]

    def locally(self, action: Callable[[], _Result]) -> _Result:
        """Like :meth:`together`, for results that stay where they are: returns that of this rank."""
        results: list[_Result] = []
        self.together(lambda: results.append(action()))
        return results[0]

    def first(self, action: Callable[[], _Result]) -> _Result:
        """Calls ``action`` on rank 0 alone; its result, or its failure, reaches every rank."""
        return self.together(lambda: action() if self.is_first else None)[0]  # type: ignore[return-value]
