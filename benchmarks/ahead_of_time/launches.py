"""Launches of Triton kernels recorded instead of run: everything that decides what machine code they get.

They are recorded from calls on meta tensors: signature, constants, alignment and options come from the launchers, so
nothing about them is written down twice. A launcher that read anything back from the device would fail on them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from dynamicemb.kernels.launch import POINTER_ALIGNMENT, LaunchOptions, intercepted
from dynamicemb.kernels.launch import Launch as Call

__all__ = ["Launch", "recorded_launches"]

_TYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.uint16: "u16", torch.bool: "i1",
    torch.uint32: "u32", torch.uint64: "u64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One way in which a kernel is launched; equal ones compile to the same machine code.

    Attributes:
        module, kernel: where the ``@triton.jit`` function is.
        signature: type of each parameter by name, in Triton's words.
        constants: value of each ``tl.constexpr`` parameter by name.
        aligned: numbers of the parameters that are multiples of :data:`~dynamicemb.kernels.launch.POINTER_ALIGNMENT`.
        options: of the launch, by name; the compiler gets :meth:`options_on` an architecture.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(call: Call) -> Launch:
        """What of a launch decides its machine code: of whole numbers, whether they need 64 bits."""
        parameters = call.kernel.params
        signature: dict[str, str] = {}
        aligned = []
        for parameter, value in zip(parameters, [*call.arguments, *call.constants.values()], strict=True):
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + _TYPE_NAMES[value.dtype]
                aligned.append(parameter.num)
            else:
                assert type(value) is int and parameter.do_not_specialize, f"{call.kernel.__name__}: {parameter.name}"
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        constants = {
            parameter.name: call.constants[parameter.name] for parameter in parameters if parameter.is_constexpr
        }
        return Launch(
            module=call.kernel.__module__,
            kernel=call.kernel.__name__,
            signature=tuple(signature.items()),
            constants=tuple(constants.items()),
            aligned=tuple(aligned),
            options=tuple(sorted(call.options._asdict().items())),
        )

    @property
    def function(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What is known about arguments, as Triton's compiler takes it."""
        return {(number,): [["tt.divisibility", POINTER_ALIGNMENT]] for number in self.aligned}

    def options_on(self, compute_capability: int) -> dict[str, Any]:
        """As Triton's compiler takes them for an architecture."""
        return LaunchOptions(**dict(self.options)).for_triton(compute_capability)

    @property
    def setting(self) -> dict[str, Any]:
        """Types, constants and options by name: what one launch of the kernel may have different from another."""
        types = {name: type_name for name, type_name in self.signature if type_name != "constexpr"}
        return {**dict(self.constants), **types, **dict(self.options)}

    def __str__(self) -> str:
        return f"{self.kernel}[{', '.join(f'{name}={value}' for name, value in self.constants)}]"


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects the launches inside the block instead of running them; each distinct one once, in order."""
    launches: dict[Launch, None] = {}
    result: list[Launch] = []

    def record(call: Call) -> None:
        assert 0 < call.programs < 2**31, f"{call.kernel.__name__}: {call.programs} programs"
        launches[Launch.of(call)] = None

    with intercepted(record):
        yield result
    result += launches
