"""What the tests of compiled kernels share: the functions of the package, and those of its launches that are compiled.

The machinery belongs to ``benchmarks/aot.py``, which compiles all launches.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

from triton.runtime.jit import JITFunction

import dynamicemb.kernels
from dynamicemb.kernels.occupancy import resident_programs

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "benchmarks") not in sys.path:
    # `make aot` runs them by path, so they import each other by their bare names.
    sys.path.insert(0, str(ROOT / "benchmarks"))

from ahead_of_time.architectures import ARCHITECTURES  # noqa: E402
from ahead_of_time.barriers import races  # noqa: E402
from ahead_of_time.configurations import ALL, SOME, group_step, launches_of, width_classes  # noqa: E402
from ahead_of_time.launches import Launch, recorded_launches  # noqa: E402
from ahead_of_time.machine_code import MachineCode, compiled, machine_code, sass  # noqa: E402
from ahead_of_time.ptx import PtxError, parse  # noqa: E402
from ahead_of_time.random_interpretation import RandomInterpreter  # noqa: E402

__all__ = [
    "ARCHITECTURES", "ROOT", "Launch", "PtxError", "RandomInterpreter", "code_of", "compilations", "compiled",
    "every_launch", "functions", "group_step", "kernels", "parse", "ptx_of", "races", "recorded_launches", "sass",
    "some_launches", "variant", "warps_that_fit", "width_classes",
]  # fmt: skip


@functools.cache
def every_launch() -> list[Launch]:
    """Each launch of the package."""
    return launches_of(ALL)


@functools.cache
def some_launches() -> list[Launch]:
    """Those that tests compile: every kernel, optimizer and dtype, the commonest layout and the corners."""
    return launches_of(SOME)


@functools.cache
def code_of(launch: Launch, compute_capability: int) -> MachineCode:
    return machine_code(launch, compute_capability)


def variant(launch: Launch) -> str:
    """The kernel, and what is compiled into it of which other launches of it have nothing: the normal quantile."""
    return f"{launch.kernel}, quantile" if dict(launch.constants).get("NORMAL") else launch.kernel


@functools.cache
def hungriest() -> list[Launch]:
    """Of each variant the launch among :func:`some_launches` with most registers on an H100, then with most code."""
    most: dict[str, Launch] = {}
    for launch in sorted(some_launches(), key=lambda launch: (code_of(launch, 90).registers, len(ptx_of(launch)))):
        most[variant(launch)] = launch
    return [*most.values()]


def compilations() -> Iterator[tuple[Launch, int]]:
    """What tests look at: :func:`some_launches` for an H100, :func:`hungriest` for A100 and B200, to save minutes."""
    for compute_capability in ARCHITECTURES:
        for launch in some_launches() if compute_capability == 90 else hungriest():
            yield launch, compute_capability


def warps_that_fit(registers: int) -> int:
    """On a multiprocessor of any architecture, with so many registers for each thread, if nothing else limits them."""
    return 4 * resident_programs(4, registers)


def ptx_of(launch: Launch) -> str:
    """For an H100."""
    return str(compiled(launch, 90).asm["ptx"])


@functools.cache
def functions() -> dict[str, JITFunction]:
    """Every ``@triton.jit`` function of the package, by module and name."""
    found: dict[str, JITFunction] = {}
    for module in pkgutil.walk_packages(dynamicemb.kernels.__path__, "dynamicemb.kernels."):
        if "triton" in module.name.rsplit(".", 1)[-1]:
            members = vars(importlib.import_module(module.name)).values()
            found |= {f"{item.__module__}.{item.__name__}": item for item in members if isinstance(item, JITFunction)}
    return found


def _called_in(function: JITFunction) -> set[str]:
    tree = ast.parse(inspect.getsource(function.fn))
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def kernels() -> set[str]:
    """Names of the functions that no other one calls."""
    called = set().union(*(_called_in(function) for function in functions().values()))
    return {function.__name__ for function in functions().values()} - called
