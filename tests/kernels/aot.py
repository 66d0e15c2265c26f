"""Ahead-of-time compilation of the Triton kernels, exactly as their launchers would launch them, without a GPU.

Launches are recorded from calls on meta tensors: signature, constants, alignment and options come from the launchers,
so nothing about them is written down twice. A launcher that read anything back from the device would fail on them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dynamicemb.kernels.launch import Launch as RawLaunch
from dynamicemb.kernels.launch import intercepted

__all__ = ["Launch", "Resources", "compiled", "recorded_launches", "resources"]

_TYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.uint16: "u16",
}  # fmt: skip
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One way in which a kernel is launched; equal ones compile to the same code."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        constants = ",".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__}[{constants}]"


@dataclass(frozen=True)
class Resources:
    """What one thread needs: registers, and bytes of local memory (spills, or arrays that found no registers)."""

    registers: int
    stack_bytes: int
    local_bytes: int


def _launch(call: RawLaunch) -> Launch:
    kernel = call.kernel
    signature, constants, aligned = {}, {}, []
    for parameter, value in zip(kernel.params, [*call.arguments, *call.constants.values()], strict=True):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = call.constants[parameter.name]
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPE_NAMES[value.dtype]
            aligned.append(parameter.num)
        else:
            assert type(value) is int and parameter.do_not_specialize, f"{kernel.__name__}: {parameter.name}"
            signature[parameter.name] = "i32"
    options = tuple(sorted(call.options._asdict().items()))
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects the launches inside the block instead of running them; each distinct one once, in order."""
    launches: list[Launch] = []

    def record(call: RawLaunch) -> None:
        assert 0 < call.programs < 2**31, f"{call.kernel.__name__}: {call.programs} programs"
        launch = _launch(call)
        if launch not in launches:
            launches.append(launch)

    with intercepted(record):
        yield launches


def compiled(launch: Launch, compute_capability: int) -> Any:
    """The compiled kernel; its ``asm`` has ``ptx`` and ``cubin``."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(number,): [["tt.divisibility", 16]] for number in launch.aligned},
    )
    target = GPUTarget("cuda", compute_capability, 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def resources(cubin: bytes) -> Resources:
    """What the machine code says about itself, read by the tool in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"])
