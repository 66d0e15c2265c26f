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

from dynamicemb.kernels.occupancy import resident_programs

__all__ = ["POINTER_ALIGNMENT", "Launch", "LaunchOptions", "grid_stride_programs", "intercepted", "launch"]

#: Bytes; what lets a thread move 128 bits at a time. Memory that torch allocates starts at multiples of 512.
POINTER_ALIGNMENT = 16

#: Programs of :func:`grid_stride_programs` for each place: an error in the number of places costs a quarter, not all.
_ROUNDS = 4
#: In Triton's interpreter, where there are no places: few, so that each program has several tiles in a test too.
_INTERPRETED_PROGRAMS = 3

#: Of tensors that are on no GPU: in Triton's interpreter, and where something stands in for the driver.
_COMPUTE_CAPABILITY_WITHOUT_GPU = 90


class LaunchOptions(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        num_warps: of a program.
        maxnreg: registers that a thread may take; None: what the compiler thinks best.
        enable_fp_fusion: whether a product and a sum may become one operation, with one rounding instead of two.
        maxnreg_ampere: in place of ``maxnreg`` before compute capability 9.0; None: no other.
    """

    num_warps: int = 4
    maxnreg: Optional[int] = None
    enable_fp_fusion: bool = True
    maxnreg_ampere: Optional[int] = None

    def registers(self, compute_capability: int) -> Optional[int]:
        """That a thread may take on an architecture, 90 for 9.0."""
        return self.maxnreg if self.maxnreg_ampere is None or compute_capability >= 90 else self.maxnreg_ampere

    def for_triton(self, compute_capability: int) -> dict[str, Any]:
        """What Triton's compiler is told for an architecture."""
        return {
            "num_warps": self.num_warps,
            "maxnreg": self.registers(compute_capability),
            "enable_fp_fusion": self.enable_fp_fusion,
        }


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
            self.kernel[(self.programs,)](
                *self.arguments, **self.constants, **self.options.for_triton(_COMPUTE_CAPABILITY_WITHOUT_GPU)
            )


_handler: Optional[Callable[[Launch], None]] = None
_compiled: dict[tuple[Any, ...], Any] = {}
_NOWHERE = nullcontext()
_hashed: set[int] = set()


@contextmanager
def intercepted(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the block, ``handler`` gets every launch of this process instead of the GPU; it may call ``run``."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def _hash_callees_first(function: Any) -> None:
    """Makes the key of a kernel in Triton's cache on disk independent of what this process has launched before.

    The key counts constants of the functions that a kernel calls only if those were hashed before the kernel was. So
    one kernel would have several keys, and be compiled several times, by processes that launch in different orders.
    """
    if id(function) in _hashed:
        return
    _hashed.add(id(function))
    for name in function.fn.__code__.co_names:
        callee = function.fn.__globals__.get(name)
        if isinstance(callee, JITFunction):
            _hash_callees_first(callee)
    _ = function.cache_key


@functools.cache
def _sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def _compute_capability(device_index: int) -> int:
    if device_index < 0:
        return _COMPUTE_CAPABILITY_WITHOUT_GPU
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def grid_stride_programs(tiles: int, like: torch.Tensor, options: LaunchOptions) -> int:
    """Programs that share ``tiles`` tiles, of which only the device knows how many have anything in them.

    Program ``p`` of ``n`` takes the tiles ``p``, ``p + n``, ``p + 2 * n`` and so on. There are four programs for each
    place that the GPU of ``like`` has for one, so they run in four rounds. One round would need the fewest starts, but
    it must be one exactly: if a single program finds no place, it starts when the others end, walks a whole share alone
    and doubles the time of the launch. With four rounds it adds a quarter, and so does any GPU whose limits differ from
    those in :mod:`~dynamicemb.kernels.occupancy`. Rounds also even out tiles that take unequal time.

    A start takes about a microsecond of one of the GPU's places, which programs without a tile waste. With four rounds
    that is four microseconds at most. A program for each tile of a million ids, if every id occurs three times, would
    waste hundreds.

    Places follow from ``options``, whose limit of registers is taken for what a thread needs. Shared memory is not
    counted: the kernels that are launched like this have 4 KiB at most, and it is never what limits them.
    """
    registers = options.registers(_compute_capability(device_index := like.get_device()))
    assert registers is not None, "only a limit of registers says how many programs fit"
    if device_index < 0:
        return min(tiles, _INTERPRETED_PROGRAMS)
    places = _sms(device_index) * resident_programs(options.num_warps, registers)
    assert places > 0, f"no program of {options.num_warps} warps with {registers} registers fits"
    return min(tiles, _ROUNDS * places)


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
            _hash_callees_first(kernel)
            keywords = options.for_triton(_compute_capability(index))
            _compiled[key] = kernel[(programs,)](*arguments, **constants, **keywords)
        else:
            compiled[(programs, 1, 1)](*values, *constants.values())
