"""A decision of one rank that every rank of a group learns, also if it is an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, TypeVar, Union

import torch.distributed as dist

from dynamicemb.errors import RemoteRankError
from dynamicemb.planner.gloo import let_threads_finish_at_exit

__all__ = ["decide_on_first_rank"]

T = TypeVar("T")


@dataclass
class _Failure:
    error: Exception


def decide_on_first_rank(group: dist.ProcessGroup, decide: Callable[[], T]) -> T:
    """Call ``decide`` on the group's first rank and return its result on every rank of ``group``.

    Every rank of the group must call this. It blocks until the first rank has decided.

    Raises:
        Exception: whatever ``decide`` raised, on every rank, with the same type and message.
            :class:`~dynamicemb.errors.RemoteRankError` takes its place on the other ranks if it cannot be pickled.
    """
    let_threads_finish_at_exit(group)
    outcome: Union[T, _Failure, None] = None
    own_error: Optional[Exception] = None
    if group.rank() == 0:
        try:
            outcome = decide()
        except Exception as error:
            own_error, outcome = error, _Failure(_portable(error))
    if group.size() > 1:
        # Not torchrec's invoke_on_rank_and_broadcast_result: its other ranks would wait forever for one that raised,
        # and it takes a rank of the group for a global one.
        objects = [outcome]
        dist.broadcast_object_list(objects, src=dist.get_global_rank(group, 0), group=group)
        outcome = objects[0]
    if own_error is not None:
        raise own_error
    if isinstance(outcome, _Failure):
        outcome.error.add_note(f"raised on rank {dist.get_global_rank(group, 0)} for all ranks")
        raise outcome.error
    return outcome  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """``error``, or a stand-in with its message if other processes could not unpickle it."""
    try:
        copied = pickle.loads(pickle.dumps(error))
        if type(copied) is type(error) and str(copied) == str(error):
            return error
    except Exception:  # pickling runs the code of an arbitrary class
        pass
    return RemoteRankError(f"{type(error).__name__} on the first rank: {error}")
