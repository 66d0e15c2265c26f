"""Kernels of four warps that read and write the same memory, each with its barrier and without."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import launch


@triton.jit
def clear_kernel(flags, rows, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BARRIER: tl.constexpr):
    """Copies the rows that have a flag, and takes the flags away: each warp reads those of its rows, one clears all."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    flag = tl.load(flags + row)
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, tl.load(rows + at), mask=(flag != 0)[:, None])
    if BARRIER:
        tl.debug_barrier()
    tl.store(flags + row, tl.zeros_like(flag), mask=flag != 0)


@triton.jit
def accumulate_kernel(values, state, COLUMNS: tl.constexpr, BARRIER: tl.constexpr):
    """Adds a sum over all warps to a number, which is read before the warps meet for the sum, or after."""
    at = tl.program_id(0)
    value = tl.load(values + at * COLUMNS + tl.arange(0, COLUMNS))
    if BARRIER:
        before = tl.load(state + at)
        tl.store(state + at, before + tl.sum(value, axis=0))
    else:
        total = tl.sum(value, axis=0)
        tl.store(state + at, tl.load(state + at) + total)


@triton.jit
def reverse_kernel(values, spare, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """Other threads read what was written."""
    at = tl.arange(0, TILE)
    tl.store(spare + at, tl.load(values + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(values + at, tl.load(spare + TILE - 1 - at))


@triton.jit(do_not_specialize=["steps"])
def rounds_kernel(values, steps, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """What a round writes, other threads read in the next one."""
    at = tl.arange(0, TILE)
    for _ in range(steps):
        value = tl.load(values + at)
        tl.debug_barrier()
        tl.store(values + TILE - 1 - at, value + 1)
        if BARRIER:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["steps"])
def sometimes_kernel(values, spare, steps, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """Without BARRIER, a barrier lies on one of two paths from the store to the load."""
    at = tl.arange(0, TILE)
    tl.store(spare + at, tl.load(values + at))
    if BARRIER:
        tl.debug_barrier()
    elif steps > 3:
        tl.debug_barrier()
        tl.store(values + at, at)
    tl.store(values + at, tl.load(spare + (at ^ 64)))


@triton.jit
def count_kernel(counters, out, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """Reads what other threads count."""
    at = tl.arange(0, TILE)
    tl.atomic_add(counters + at, 1, sem="relaxed")
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, tl.load(counters + (at ^ 64)))


@triton.jit
def exchanged_kernel(slots, values, out, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """A thread gets through shared memory where another one writes, and reads it."""
    at = tl.arange(0, TILE)
    slot = tl.load(slots + at)
    other_slot = tl.gather(slot, TILE - 1 - at, 0)
    tl.store(values + slot, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, tl.load(values + other_slot))


@triton.jit
def own_kernel(values, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """Each thread reads and writes what is its own: needs no barrier."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.load(values + at)
    tl.store(values + at, value + 1)
    if BARRIER:
        tl.debug_barrier()
    tl.store(values + at, tl.load(values + at) * value)


@triton.jit
def atomic_kernel(values, counters, TILE: tl.constexpr, BARRIER: tl.constexpr):
    """All threads add to the same counters, which nothing else reads: needs no barrier."""
    value = tl.load(values + tl.arange(0, TILE))
    tl.atomic_add(counters + (value & 3), 1, sem="relaxed")
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_add(counters + (value & 1), 1, sem="relaxed")


def launch_all(barrier: bool) -> None:
    """Each once, on tensors without memory."""
    numbers, others, more = (torch.empty(4096, dtype=torch.int32, device="meta") for _ in range(3))
    launch(clear_kernel, 8, numbers, others, more, ROWS=8, COLUMNS=128, BARRIER=barrier)
    launch(accumulate_kernel, 8, numbers, others, COLUMNS=512, BARRIER=barrier)
    launch(reverse_kernel, 1, numbers, others, TILE=128, BARRIER=barrier)
    launch(rounds_kernel, 1, numbers, 7, TILE=128, BARRIER=barrier)
    launch(sometimes_kernel, 1, numbers, others, 7, TILE=128, BARRIER=barrier)
    launch(count_kernel, 1, numbers, others, TILE=128, BARRIER=barrier)
    launch(exchanged_kernel, 1, numbers, others, more, TILE=128, BARRIER=barrier)
    launch(own_kernel, 1, numbers, TILE=512, BARRIER=barrier)
    launch(atomic_kernel, 1, numbers, others, TILE=512, BARRIER=barrier)
