"""Real processes with gloo for tests: one function, called on every rank, its results brought back."""

from __future__ import annotations

import datetime
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run_on_ranks"]

#: A collective that does not end within this time has hung, and fails.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=120)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(
    rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple, results: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    try:
        results.put((rank, True, function(rank, world_size, *arguments)))
    except BaseException:  # the parent raises it again
        results.put((rank, False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls ``function(rank, world_size, *arguments)`` in ``world_size`` processes joined by gloo.

    Args:
        world_size: number of processes.
        function: of a module, so that it can be pickled; what it returns has to be picklable and free of tensors that
            share memory (convert to NumPy).
        arguments: passed on.

    Returns:
        The results by rank.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, function, arguments, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    failures: list[str] = []
    try:
        for _ in range(world_size):
            rank, succeeded, result = results.get(timeout=300)
            collected[rank] = result
            if not succeeded:
                failures.append(f"rank {rank} failed:\n{result}")
                break
    finally:
        for process in processes:
            process.join(timeout=10 if not failures else 1)
            if process.is_alive():
                process.terminate()
    assert not failures, failures[0]
    return [collected[rank] for rank in range(world_size)]
