"""The pool of threads that run the CPU kernels, in a process that was forked from one that has such a pool."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from dynamicemb.kernels.numba_support import parallel_for
from tests.processes import TIMEOUT_SECONDS

#: The parent has used its pool, and holds the pool's lock while it forks, as another of its threads may.
_FORK = """
import os, threading, torch
from dynamicemb.kernels import numba_support
from dynamicemb.kernels.numba_support import parallel_for

def used():
    seen, barrier = set(), threading.Barrier(2)
    def work(start, stop):
        seen.add(threading.current_thread().name)
        try:
            if len(seen) < 2:
                barrier.wait(20)
            else:
                barrier.abort()
        except threading.BrokenBarrierError:
            pass
    parallel_for(work, 1000, min_items=1)
    return sorted(seen)

torch.set_num_threads(2)
assert len(used()) == 2
with numba_support._pool_lock:
    child = os.fork()
if child == 0:
    print("child", len(used()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", len(used()))
"""


def test_a_forked_process_has_a_pool_of_its_own() -> None:
    """The threads of the parent's pool are not there, and the lock that it held is never given back."""
    ended = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["child", "2", "parent", "2"]


def test_nobody_works_on_after_an_interruption() -> None:
    """Memory that ranges are written to may be given back as soon as the call has ended."""
    begun, ended = threading.Event(), []

    def work(start: int, stop: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.2)
        ended.append(start)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            parallel_for(work, 1000, min_items=1)
    finally:
        torch.set_num_threads(threads)
    assert len(ended) == 1
    time.sleep(0.3)
    assert len(ended) == 1
