"""The end of a process whose ranks are joined by gloo.

gloo works in threads of its own, and such a thread lets go of the tensors of a collective some time after the
collective has returned. Since tensors and their Python objects keep each other alive by their reference counts
(pytorch/pytorch pull requests 166342 and 167564 of autumn 2025; torch 2.11 to 2.15 have it, as ``kHasPyObject`` in
``c10/util/intrusive_ptr.h``) it takes Python's lock to do so. Where the interpreter has begun to end by then, CPython
before 3.14 ends the thread while it waits for the lock, by unwinding its stack, and that reaches a destructor that must
not throw: the process aborts, with "terminate called without an active exception" and exit code 134, after its work is
done. ``destroy_process_group()`` need not prevent it: while a model holds the group, it does not wait for the thread.
Upstream this is known (issue 190489, open; pull request 179291, closed without a remedy).

A process that gives up the lock for a moment before the interpreter ends lets the thread do its part. ``atexit`` is the
place: it comes after the program's last collective, whatever that was, and before the interpreter begins to end. A
process that ends by ``os._exit``, as forked children of :mod:`multiprocessing` do, never gets to where it would abort.
"""

from __future__ import annotations

import atexit
import functools
import time
from typing import Optional

import torch.distributed as dist

__all__ = ["let_threads_finish_at_exit"]

#: Seconds that the hook sleeps; benchmarks/process_end.py counts what that changes.
_SECONDS = 0.05


def let_threads_finish_at_exit(process_group: Optional[dist.ProcessGroup]) -> None:
    """Makes the end of this process leave gloo's threads the time to let go of tensors, if gloo joins the group.

    Any number of calls in a process have the effect of one.

    Args:
        process_group: of which collectives are called; None: no group, and nothing to do.
    """
    if process_group is not None and dist.is_initialized() and "gloo" in dist.get_backend_config(process_group):
        _register()


@functools.cache
def _register() -> None:
    atexit.register(_give_up_lock)


def _give_up_lock() -> None:
    time.sleep(_SECONDS)
