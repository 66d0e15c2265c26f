"""What the Numba kernels share: compilation with a cache that cannot go stale, threads, pointers, 128-bit products."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Optional

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic

from dynamicemb.kernels.numba_cache import kernel_cache

__all__ = [
    "MIN_ITEMS_PER_THREAD",
    "always_inline",
    "as_bytes",
    "as_float32",
    "as_int64",
    "as_uint16",
    "as_uint32",
    "as_uint64",
    "copy_bytes",
    "inline",
    "kernel",
    "mulhi64",
    "parallel_for",
    "prefetch",
    "prefetch_to_write",
    "rows_ahead",
    "stack_bytes",
]  # fmt: skip


_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles ``function`` on first use, cached on disk; it releases the GIL, so :func:`parallel_for` can run it.

    It cannot allocate arrays: for that Numba would count references to all arrays, and where one is handed to another
    function, count atomically: in kernels of that kind that was half of the time for a row. Scratch memory comes from
    :func:`stack_bytes` or from the caller.
    """
    dispatcher = numba.njit(no_cfunc_wrapper=True, **_OPTIONS)(function)
    dispatcher._cache = kernel_cache(function)
    return dispatcher


#: For functions called from kernels: compiled into them. Python must not call them: the wrappers for that, a fifth of
#: what there was to compile, are left out.
inline = numba.njit(inline="never", no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)

#: As ``inline``, for arithmetic in a loop over values: LLVM copies it to the caller whatever its size, without which no
#: loop around it is vectorised.
always_inline = numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)

#: Several ranges for each thread, so that nobody waits long for one that was woken late or shares its core.
_RANGES_PER_THREAD = 4

#: Ranges shorter than this run in the calling thread: handing one over costs about 20 microseconds, and up to a
#: millisecond after a step of torch's own, whose threads spin for a while before they sleep.
MIN_ITEMS_PER_THREAD = 2048
_pool: Optional[ThreadPoolExecutor] = None
_pool_size = 0
_pool_lock = threading.Lock()


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < threads:
            _pool = ThreadPoolExecutor(threads, thread_name_prefix="dynamicemb")
            _pool_size = threads
        return _pool


def _forget_executor() -> None:
    """A forked child has the pool but none of its threads: it would wait forever for them."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


os.register_at_fork(after_in_child=_forget_executor)


def parallel_for(
    function: Callable[..., Any], total: int, *arguments: Any, min_items: int = MIN_ITEMS_PER_THREAD
) -> None:
    """Calls ``function(start, stop, *arguments)`` over ranges that cover ``[0, total)``, in ``torch.get_num_threads()``
    threads, each with at least ``min_items`` items. The result may not depend on where the ranges are cut."""
    threads = max(1, min(torch.get_num_threads(), total // min_items))
    if threads == 1:
        function(0, total, *arguments)
        return
    ranges = threads * _RANGES_PER_THREAD
    cuts = [total * index // ranges for index in range(ranges + 1)]
    # Threads take the next one each, which the interpreter lock makes safe: nothing else runs within a list's iterator.
    waiting = iter(list(itertools.pairwise(cuts)))

    def work() -> None:
        for start, stop in waiting:
            function(start, stop, *arguments)

    pool = _executor(threads - 1)
    helpers: list[Future[None]] = [pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        # If this thread is interrupted, nobody begins another range, and nobody works on in memory that is given back.
        for _ in waiting:
            pass
        for helper in helpers:
            if not helper.cancel():  # one that has not even begun by now is not waited for
                helper.result()


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def cast(typing_context, address):  # type: ignore[no-untyped-def]
        signature = types.CPointer(element)(types.int64)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return cast


#: int64 address -> pointer, to be indexed or handed to ``numba.carray``.
as_bytes = _pointer_to(types.uint8)
as_uint16 = _pointer_to(types.uint16)
as_uint32 = _pointer_to(types.uint32)
as_uint64 = _pointer_to(types.uint64)
as_int64 = _pointer_to(types.int64)
as_float32 = _pointer_to(types.float32)


@intrinsic
def stack_bytes(typing_context, num_bytes):  # type: ignore[no-untyped-def]
    """int64 address of so many bytes, a constant, in the frame of the kernel; undefined, at a multiple of 64."""
    if not isinstance(num_bytes, types.IntegerLiteral):
        raise errors.RequireLiteralValue("the size must be a constant")
    signature = types.int64(num_bytes)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), num_bytes.literal_value))
        memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return signature, generate


@intrinsic
def copy_bytes(typing_context, target, source, num_bytes):  # type: ignore[no-untyped-def]
    """memcpy between two addresses; a slice assignment costs several times as much for a row of a few hundred bytes."""
    signature = types.void(types.int64, types.int64, types.int64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = context.get_value_type(types.CPointer(types.uint8))
        to, source_pointer = builder.inttoptr(arguments[0], pointer), builder.inttoptr(arguments[1], pointer)
        cgutils.raw_memcpy(builder, to, source_pointer, arguments[2], 1)
        return context.get_dummy_value()

    return signature, generate


def _prefetch_line(to_write: bool) -> Any:
    @intrinsic
    def prefetch_line(typing_context, address):  # type: ignore[no-untyped-def]
        signature = types.void(types.int64)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            byte_pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte_pointer, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            numbers = [ir.Constant(number, value) for value in (int(to_write), 3, 1)]  # into all caches, as data
            builder.call(function, [builder.inttoptr(arguments[0], byte_pointer), *numbers])
            return context.get_dummy_value()

        return signature, generate

    return prefetch_line


_line_to_read, _line_to_write = _prefetch_line(to_write=False), _prefetch_line(to_write=True)


@inline
def prefetch(address, num_bytes):  # type: ignore[no-untyped-def]
    """Asks for the cache lines of ``num_bytes`` bytes from ``address`` on before they are needed; never faults."""
    for line in range(address & ~63, address + num_bytes, 64):
        _line_to_read(line)


@inline
def prefetch_to_write(address, num_bytes):  # type: ignore[no-untyped-def]
    """Like :func:`prefetch`, for lines that will be written to."""
    for line in range(address & ~63, address + num_bytes, 64):
        _line_to_write(line)


@inline
def rows_ahead(row_bytes):  # type: ignore[no-untyped-def]
    """How many rows a kernel looks ahead. Narrow ones are done long before an access at random; of wide ones 8 KiB are
    all that the first-level cache keeps beside the rest."""
    return max(np.int64(8), min(np.int64(24), np.int64(8192) // row_bytes))


@intrinsic
def mulhi64(typing_context, a, b):  # type: ignore[no-untyped-def]
    """High 64 bits of the 128-bit product of two uint64."""
    signature = types.uint64(types.uint64, types.uint64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return signature, generate
