"""The pool of threads that run the CPU kernels, in a process that was forked from one that has such a pool."""

from __future__ import annotations

import subprocess
import sys

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
    ended = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["child", "2", "parent", "2"]
