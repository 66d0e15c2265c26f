"""Calls that all ranks must make together: one that others do not join ends in an error instead of a hang."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Optional

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from dynamicemb.errors import CollectiveError

__all__ = ["collective"]

#: Seconds between looks at the store, at least and at most, and as a share of the time waited so far: a rank that is
#: late costs the others little more than its delay, and thousands of them do not keep the store busy.
_LOOK_SECONDS = (0.001, 2.0)
_LOOK_SHARE = 0.05

#: How often the ranks of a group have come together; part of the names under which they do it.
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


@contextmanager
def collective(call: str, pg: Optional[dist.ProcessGroup]) -> Iterator[None]:
    """Lets the body begin when all ranks have come to the same call.

    Ranks meet in the store of their group, not in a collective of it: what ranks that do not come do meanwhile cannot
    be mistaken for an answer, and it is known who they are. Costs about a millisecond; nothing on a single rank.

    Args:
        call: what the user has called, such as ``state_dict()``.
        pg: the ranks; None: this process alone.

    Raises:
        CollectiveError: others did not make the same call within the time-out of the group. This rank has left, so that
            a later call can succeed. Or the backend failed in the body, since a rank no longer takes part.
    """
    if pg is None or pg.size() == 1:
        yield
        return
    _meet(call, pg)
    try:
        yield
    except RuntimeError as error:
        if not _is_of_backend(error):
            raise
        raise CollectiveError(
            f"rank {pg.rank()} of {pg.size()}: {call} failed, since another rank no longer takes part in it (its own "
            f"message says why): {error}"
        ) from error


def _is_of_backend(error: RuntimeError) -> bool:
    # gloo's errors are RuntimeErrors that name its source files.
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))


def _meet(call: str, pg: dist.ProcessGroup) -> None:
    store, number, time_out = _get_process_group_store(pg), _meetings.get(pg, 0) + 1, _time_out(pg)
    keys = [_key(number, rank) for rank in range(pg.size())]
    try:
        store.set(keys[pg.rank()], call)
        others = _wait(store, keys, call, time.monotonic() + time_out.total_seconds())
    except KeyboardInterrupt:
        store.delete_key(keys[pg.rank()])
        raise
    except RuntimeError as error:  # of a store that has gone with the process that held it
        raise CollectiveError(
            f"{call} of a model with dynamic tables is collective, but rank {pg.rank()} of {pg.size()} cannot reach "
            f"the others, whose processes may have ended: {error}"
        ) from error
    if others:
        store.delete_key(keys[pg.rank()])
        absent = [str(rank) for rank, other in others.items() if other is None]
        elsewhere = [f"rank {rank} called {other} instead" for rank, other in others.items() if other is not None]
        if absent:
            elsewhere.insert(0, f"rank{'s' if len(absent) > 1 else ''} {', '.join(absent)} did not")
        raise CollectiveError(
            f"{call} of a model with dynamic tables is collective: all ranks call it, but within "
            f"{time_out.total_seconds():g} s (the time-out of the process group) {', and '.join(elsewhere)}; this is "
            f"rank {pg.rank()} of {pg.size()}"
        )
    # Whoever is here has left the meeting before.
    if number > 1:
        store.delete_key(_key(number - 1, pg.rank()))
    _meetings[pg] = number


def _key(number: int, rank: int) -> str:
    return f"dynamicemb/collective/{number}/{rank}"


def _wait(store: dist.Store, keys: Sequence[str], call: str, deadline: float) -> dict[int, Optional[str]]:
    """Waits until every key says ``call``. Returns what other ranks say instead, None for nothing, at the deadline."""
    began = time.monotonic()
    while True:
        # Not Store.wait: it keeps other threads of the process from the store, and signals from being seen.
        is_over, all_there = time.monotonic() >= deadline, store.check(list(keys))
        if all_there:
            said: list[Any] = [value.decode() for value in store.multi_get(list(keys))]
        elif is_over:
            said = [store.get(key).decode() if store.check([key]) else None for key in keys]
        if all_there or is_over:
            others = {rank: other for rank, other in enumerate(said) if other != call}
            if is_over or not others:
                return others
        (shortest, longest), now = _LOOK_SECONDS, time.monotonic()
        time.sleep(min(max(shortest, _LOOK_SHARE * (now - began)), longest, max(0.0, deadline - now)))


def _time_out(pg: dist.ProcessGroup) -> timedelta:
    for device in pg._device_types:
        options = getattr(pg._get_backend(device), "options", None)
        time_out = getattr(options, "_timeout", None)
        if time_out is not None:
            return time_out
    return dist.default_pg_timeout
