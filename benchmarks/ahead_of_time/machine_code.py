"""Compiles a launch for an architecture, and reads from the result what it needs and how it accesses memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ahead_of_time.launches import Launch

__all__ = ["MachineCode", "access_widths", "compiled", "machine_code", "resources", "sass", "spilled_bytes"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# LDL, STL: loads and stores of memory that each thread has for itself.
_LOCAL_ACCESS = re.compile(r"\b(LDL|STL)\b")
# ld.global.v4.b32, ld.global.L1::evict_last.b64, ld.relaxed.gpu.global.u32: qualifiers, then how many, then of what.
_ACCESS = re.compile(r"\b(ld|st)((?:\.[\w:]+)*)\.[a-z]+(\d+)[ \t]")
# cp.async.cg.shared.global [to], [from], bytes: a load that goes past the registers.
_ASYNCHRONOUS_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")


@dataclass(frozen=True)
class MachineCode:
    """What one program of a kernel needs, and how its threads access global memory.

    Attributes:
        registers: of a thread.
        spilled_bytes: memory of a thread that stands in for registers; should be 0.
        shared_bytes: of a program.
        warps: of a program.
        loads, stores: instructions in the code by the bytes that a thread moves with one of them, widest first.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    loads: tuple[tuple[int, int], ...]
    stores: tuple[tuple[int, int], ...]


def compiled(launch: Launch, compute_capability: int) -> Any:
    """The compiled kernel; its ``asm`` has ``ptx`` and ``cubin``. Kept in Triton's cache on disk."""
    source = ASTSource(launch.function, dict(launch.signature), dict(launch.constants), launch.attributes)
    target = GPUTarget("cuda", compute_capability, 32)
    return triton.compile(source, target=target, options=launch.options_on(compute_capability))


def resources(cubin: bytes) -> dict[str, int]:
    """What the machine code says about itself (REG, STACK, LOCAL, ...), read by the tool in Triton's wheel."""
    report = _report_on(cubin, "cuobjdump", "--dump-resource-usage")
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", report)}


def spilled_bytes(cubin: bytes, used: dict[str, int]) -> int:
    """Memory of a thread that stands in for registers, or for arrays that found none.

    Not counted is memory that no instruction touches: Triton 3.8 reserves a byte for bits that it packs, and then packs
    them in a register.
    """
    reserved = used["STACK"] + used["LOCAL"]
    return reserved if reserved and _LOCAL_ACCESS.search(sass(cubin)) else 0


def sass(cubin: bytes) -> str:
    """The machine code as text."""
    return _report_on(cubin, "nvdisasm", "--print-code")


def _report_on(cubin: bytes, tool: str, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def access_widths(ptx: str) -> tuple[Counter[int], Counter[int]]:
    """Loads from and stores to global memory in PTX: instructions by the bytes that a thread moves with each."""
    widths: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for kind, qualifiers, bits in _ACCESS.findall(ptx):
        parts = qualifiers.split(".")
        if "global" in parts:
            values = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            widths[kind][values * int(bits) // 8] += 1
    widths["ld"].update(int(size, 0) for size in _ASYNCHRONOUS_COPY.findall(ptx))
    return widths["ld"], widths["st"]


def machine_code(launch: Launch, compute_capability: int) -> MachineCode:
    """Compiles ``launch`` and reads the result."""
    kernel = compiled(launch, compute_capability)
    used = resources(kernel.asm["cubin"])
    loads, stores = access_widths(kernel.asm["ptx"])
    return MachineCode(
        registers=used["REG"],
        spilled_bytes=spilled_bytes(kernel.asm["cubin"], used),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        loads=tuple(sorted(loads.items(), reverse=True)),
        stores=tuple(sorted(stores.items(), reverse=True)),
    )
