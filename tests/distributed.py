"""Real processes for tests: one function, called on every rank, its results brought back.

Ranks joined by gloo are forked from one process that has the slow imports behind it (:mod:`tests.preload`), so that a
launch costs a tenth of a second and each test can have its own. A fork cannot use CUDA if anything that its parent
imported has asked for a GPU, so ranks joined by NCCL are new processes, which takes seconds.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing.process
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import TIMEOUT_SECONDS

__all__ = ["run_on_ranks"]

#: A collective that does not end within this time has hung, and fails.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)


def _rank_main(
    rank: int, world_size: int, backend: str, store: str, function: Callable[..., Any], arguments: tuple, results: Any
) -> None:
    # No MASTER_ADDR: whatever does not use the group that it was given fails.
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    # Shows where a rank hangs before the collective's own timeout ends it.
    faulthandler.dump_traceback_later(COLLECTIVE_TIMEOUT.total_seconds() * 0.75, exit=False)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    try:
        # By value: tensors that went through shared memory would vanish with this process.
        outcome = rank, True, pickle.dumps(function(rank, world_size, *arguments))
    except BaseException:  # the parent raises it again
        outcome = rank, False, traceback.format_exc()
    results.put(outcome)
    if outcome[1]:
        dist.barrier()
        dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list[Any]:
    """Calls ``function(rank, world_size, *arguments)`` in ``world_size`` processes.

    Args:
        world_size: number of processes.
        function: of a module, so that it can be pickled, as must be what it returns.
        arguments: passed on.
        backend: what joins the processes: gloo, or NCCL with a GPU of its own for each.

    Returns:
        The results by rank.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or because a rank died or did not end.
    """
    context = mp.get_context("forkserver" if backend == "gloo" else "spawn")
    context.set_forkserver_preload(["tests.preload"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, backend, store, function, arguments, results))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            collected = [_next_result(results, processes) for _ in processes]
            for process in processes:
                process.join(timeout=10)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return [pickle.loads(result) for _, result in sorted(collected)]


def _next_result(results: Any, processes: Sequence[multiprocessing.process.BaseProcess]) -> tuple[int, bytes]:
    deadline = time.monotonic() + TIMEOUT_SECONDS  # the first launch also waits for every kernel to be compiled
    while time.monotonic() < deadline:
        dead = [process.exitcode for process in processes if process.exitcode]
        try:
            rank, succeeded, result = results.get(timeout=1)
        except queue.Empty:
            assert not dead, f"ranks died with exit codes {dead}"
            continue
        assert succeeded, f"rank {rank} failed:\n{result}"
        return rank, result
    raise AssertionError(f"the ranks did not end within {TIMEOUT_SECONDS} seconds")
