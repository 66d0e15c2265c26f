"""Kernels that are wrong on purpose, so that tests can show that it is noticed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch

_SHIFT = tl.constexpr(7)
_OTHER_SHIFT = tl.constexpr(8)
_MOVE = _SHIFT


@triton.jit
def _scaled(values, factor, SHIFT: tl.constexpr):
    return values * factor + SHIFT


@triton.jit
def _stretched(numbers, by, OFFSET: tl.constexpr):
    """Another name for the same."""
    return numbers * by + OFFSET


@triton.jit(do_not_specialize=["total"])
def scale_kernel(source, target, total, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if total > 0:
        tl.store(target + at, _scaled(tl.load(source + at, mask=at < total), 3, SHIFT=_SHIFT), mask=at < total)


@triton.jit(do_not_specialize=["length"])
def stretch_kernel(origin, result, length, WIDTH: tl.constexpr):
    """:func:`scale_kernel`, renamed from top to bottom."""
    # And with a comment.
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    if length > 0:
        tl.store(
            result + place,
            _stretched(tl.load(origin + place, mask=place < length), 3, OFFSET=_MOVE),
            mask=place < length,
        )


@triton.jit(do_not_specialize=["total"])
def shift_kernel(source, target, total, TILE: tl.constexpr):
    """:func:`scale_kernel` with another constant: not the same."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if total > 0:
        tl.store(target + at, _scaled(tl.load(source + at, mask=at < total), 3, SHIFT=_OTHER_SHIFT), mask=at < total)


@triton.jit
def spilling_kernel(source, target, TILE: tl.constexpr):
    """Every value is needed again after their sum is known, so a thread must keep all of its 32."""
    at = tl.arange(0, TILE)
    values = tl.load(source + at)
    tl.store(target + at, values / tl.sum(values, axis=0))


@triton.jit
def narrow_kernel(source, target, TILE: tl.constexpr):
    """Every third value: no two of a thread are neighbours."""
    at = tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at * 3))


@triton.jit
def broken_kernel(source, target, TILE: tl.constexpr):
    """Does not compile."""
    tl.store(target + tl.arange(0, TILE), tl.load(source + tl.arange(0, 2 * TILE)))


def launch_all() -> None:
    """Each once, on tensors without memory."""
    source, target = (torch.empty(4096, dtype=torch.float32, device="meta") for _ in range(2))
    for kernel in (scale_kernel, shift_kernel):
        launch(kernel, 1, source, target, 100, TILE=128)
    launch(stretch_kernel, 1, source, target, 100, WIDTH=128)
    launch(spilling_kernel, 1, source, target, TILE=1024, options=LaunchOptions(num_warps=1, maxnreg=24))
    launch(narrow_kernel, 1, source, target, TILE=512)
    launch(broken_kernel, 1, source, target, TILE=512)
