"""Fresh processes: one to measure the memory of, or several that are joined by gloo."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["in_fresh_process", "on_ranks", "quieten_libraries"]

#: A collective that takes longer waits for a rank that has failed.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=120)


def quieten_libraries() -> None:
    """Hides notices that torch and torchrec address to their own developers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for library in ("torchrec", "torch.fx"):
        logging.getLogger(library).setLevel(logging.ERROR)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of a module, in a process of its own; what it returns or raises comes back."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def on_ranks(world_size: int, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function(*arguments)``, of a module, in ``world_size`` processes joined by gloo.

    Args:
        world_size: processes.
        threads: of torch in each of them.
        function: the same on all ranks; what it returns has to be picklable.

    Returns:
        What rank 0 returned.

    Raises:
        Exception: what ``function`` raised on one of the ranks that failed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with ProcessPoolExecutor(world_size, mp_context=mp.get_context("spawn")) as executor:
        running = [
            executor.submit(_on_rank, rank, world_size, port, threads, function, arguments)
            for rank in range(world_size)
        ]
        errors = [error for future in running if (error := future.exception()) is not None]
        if errors:
            # A rank that fails takes the others with it; what they report is a broken connection.
            raise next((error for error in errors if not isinstance(error, RuntimeError)), errors[0])
        return running[0].result()


def _on_rank(
    rank: int, world_size: int, port: int, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    quieten_libraries()
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
