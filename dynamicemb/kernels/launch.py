"""Launches of Triton kernels: compiled once for each way of calling them, then launched with as little as possible.

Triton's own path inspects every argument again, binds and hashes them, and looks each global of the kernel up: 9 to 11
microseconds a launch on the host. Launchers here agree on what can differ between two calls (see :func:`launch`), so a
tuple of it finds the compiled kernel, and pointers go to it as plain numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import torch
from triton.runtime.jit import JITFunction

__all__ = ["POINTER_ALIGNMENT", "Launch", "LaunchOptions", "intercepted", "launch", "resident_programs"]

#: Bytes; what lets a thread move 128 bits at a time. Memory that torch allocates starts at multiples of 512.
POINTER_ALIGNMENT = 16


# What an SM holds at once, on every NVIDIA data-centre GPU since Ampere: 64 warps, in 32 programs.
_WARPS_PER_SM, _PROGRAMS_PER_SM, _REGISTERS_PER_SM, _THREADS_PER_WARP = 64, 32, 65536, 32
#: SMs where there are none: in Triton's interpreter, so that a program has several tiles in a test too.
_INTERPRETED_SMS = 1


class LaunchOptions(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        num_warps: of a program.
        maxnreg: registers that a thread may take; None: what the compiler thinks best.
        enable_fp_fusion: whether a product and a sum may become one operation, with one rounding instead of two.
    """

    num_warps: int = 4
    maxnreg: Optional[int] = None
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Launch:
    """One launch, as a handler of :func:`intercepted` sees it.

    Attributes:
        kernel: a ``@triton.jit`` function.
        programs: size of the one-dimensional grid.
        arguments: tensors and whole numbers, in the kernel's order.
        constants: its ``tl.constexpr`` parameters, in its order.
        options: how it is compiled.
    """

    kernel: Any
    programs: int
    arguments: tuple[Union[torch.Tensor, int], ...]
    constants: dict[str, Any]
    options: LaunchOptions

    def run(self) -> None:
        """Launches it."""
        if isinstance(self.kernel, JITFunction):
            _run(self.kernel, self.programs, self.arguments, self.constants, self.options)
        else:  # Triton's interpreter
            self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.options._asdict())


_handler: Optional[Callable[[Launch], None]] = None
_compiled: dict[tuple[Any, ...], Any] = {}
_NOWHERE = nullcontext()


@contextmanager
def intercepted(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the block, ``handler`` gets every launch of this process instead of the GPU; it may call ``run``."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


@functools.cache
def _sms(device_index: int) -> int:
    return (
        torch.cuda.get_device_properties(device_index).multi_processor_count if device_index >= 0 else _INTERPRETED_SMS
    )


def resident_programs(tiles: int, like: torch.Tensor, options: LaunchOptions) -> int:
    """Programs that share ``tiles`` tiles, of which only the device knows how many have anything in them.

    A launch of a program for each tile would start, for a batch in which every id occurs three times, two empty
    programs beside each busy one, and a start costs an SM about a microsecond of one of its places. So no more programs
    start than the GPU of ``like`` holds at once, and each takes every so-many-th tile until there are none. What it
    holds follows from ``options``: a limit of registers is taken for what a thread needs.
    """
    warps = _WARPS_PER_SM
    if options.maxnreg is not None:
        warps = min(warps, _REGISTERS_PER_SM // (options.maxnreg * _THREADS_PER_WARP))
    return min(tiles, _sms(like.get_device()) * min(_PROGRAMS_PER_SM, max(1, warps // options.num_warps)))


def launch(
    kernel: Any,
    programs: int,
    *arguments: Union[torch.Tensor, int],
    options: LaunchOptions = LaunchOptions(),  # noqa: B008 (immutable)
    **constants: Any,
) -> None:
    """Launches ``kernel`` on the GPU of its first argument, in that GPU's current stream. Does not synchronise.

    Args:
        kernel: a ``@triton.jit`` function whose whole numbers are all marked ``do_not_specialize``.
        programs: size of the one-dimensional grid; nothing happens if it is 0.
        arguments: tensors of one GPU that start at multiples of :data:`POINTER_ALIGNMENT`, and whole numbers.
        options: how the kernel is compiled.
        constants: its ``tl.constexpr`` parameters, in its order.
    """
    if programs == 0:
        return
    if _handler is not None or not isinstance(kernel, JITFunction):
        call = Launch(kernel, programs, arguments, constants, options)
        _handler(call) if _handler is not None else call.run()
        return
    _run(kernel, programs, arguments, constants, options)


def _run(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], options: LaunchOptions
) -> None:
    values: list[int] = []
    # What the machine code depends on: besides the constants only dtypes (by identity: hashing one takes longer than
    # everything else here), and which numbers need 64 bits.
    way: list[Any] = [kernel.fn, arguments[0].get_device(), options, *constants.values()]
    misplaced = 0
    for argument in arguments:
        if type(argument) is int:
            values.append(argument)
            way.append(-(2**31) <= argument < 2**31)
        else:
            pointer = argument.data_ptr()
            misplaced |= pointer % POINTER_ALIGNMENT
            values.append(pointer)
            way.append(id(argument.dtype))
    assert not misplaced, f"{kernel.fn.__name__}: a tensor does not start at a multiple of {POINTER_ALIGNMENT}"
    key = tuple(way)
    index = way[1]
    with _NOWHERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index):
        if (compiled := _compiled.get(key)) is None:
            assert [*constants] == kernel.arg_names[len(arguments) :], f"{kernel.fn.__name__}: constants out of order"
            _compiled[key] = kernel[(programs,)](*arguments, **constants, **options._asdict())
        else:
            compiled[(programs, 1, 1)](*values, *constants.values())
