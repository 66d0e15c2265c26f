"""The launches of a first run on a GPU compiled for it, into an archive that can be installed there."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from quarter_hour.kernel_cache import Packed, pack
from triton.compiler import compiler

from ahead_of_time.device_run import device_run
from ahead_of_time.launches import Launch
from ahead_of_time.stand_in import stand_in
from dynamicemb.kernels.launch import Launch as Call
from dynamicemb.kernels.launch import intercepted

__all__ = ["compiled_keys", "make_archive"]


@contextmanager
def _recorded_keys() -> Iterator[set[str]]:
    """Keys of all entries of Triton's cache that are looked for inside the block."""
    keys: set[str] = set()
    key_of = compiler.get_cache_key

    def recorded(*arguments: object, **options: object) -> str:
        key: str = key_of(*arguments, **options)
        keys.add(key)
        return key

    with mock.patch.object(compiler, "get_cache_key", recorded):
        yield keys


def compiled_keys(
    launches: Callable[[], None], compute_capability: int, share: int = 0, shares: int = 1
) -> tuple[set[str], int]:
    """Compiles what ``launches`` launches, on Triton's own path, unless it is in the cache.

    Args:
        launches: launches kernels on meta tensors.
        compute_capability: of the GPU.
        share, shares: of the distinct launches, each ``shares``-th from number ``share`` on.

    Returns:
        Keys of their entries in the cache, and how many were compiled.
    """
    seen: dict[Launch, int] = {}

    def run(call: Call) -> None:
        number = seen.setdefault(Launch.of(call), len(seen))
        if number % shares == share and number == len(seen) - 1:
            call.run()

    with stand_in(compute_capability) as counts, _recorded_keys() as keys, intercepted(run):
        launches()
    return keys, len(counts.compiled)


def make_archive(
    archive: Path, compute_capability: int, processes: int, launches: Callable[[], None] = device_run
) -> tuple[Packed, int]:
    """Compiles what ``launches`` launches, by default a first run on a GPU, and packs it.

    Entries of Triton's cache stay whole, PTX included: others that find them here read it.

    Args:
        archive: a ``.tar.xz`` file.
        compute_capability: of the GPU.
        processes: that compile.
        launches: a function that other processes can import.

    Returns:
        What was packed, and how many kernels were not in Triton's cache here.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as executor:
        share = functools.partial(compiled_keys, launches, compute_capability, shares=processes)
        parts = list(executor.map(share, range(processes)))
    return pack(set().union(*(keys for keys, _ in parts)), archive), sum(compiled for _, compiled in parts)
