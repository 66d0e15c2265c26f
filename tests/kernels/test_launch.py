"""Launches: what they look compiled kernels up by, and the interception that other tests rely on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from dynamicemb.kernels import launch as module
from dynamicemb.kernels.launch import Launch, LaunchOptions, grid_stride_programs, intercepted, launch


@triton.jit(do_not_specialize=["total"])
def _copy_kernel(source, target, total, TILE: tl.constexpr, TWICE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at, mask=at < total), mask=at < total)


class CompiledKernel:
    """Stands where Triton's compiled kernel would: remembers what it was launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append((grid, arguments))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[CompiledKernel]:
    """Kernels that Triton's own path has compiled, which it does instead of running them."""
    made: list[CompiledKernel] = []

    def run(kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> Any:
        assert not warmup and all(isinstance(argument, (torch.Tensor, int)) for argument in arguments)
        made.append(CompiledKernel())
        return made[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(module, "_compiled", {})
    return made


def test_a_second_launch_passes_triton_by(compiled: list[CompiledKernel]) -> None:
    source, target = torch.zeros(64), torch.zeros(64)
    for total in (5, 16, 1):
        launch(_copy_kernel, total, source, target, total, TILE=16, TWICE=False)
    assert len(compiled) == 1  # the first launch went through Triton, and ran there
    pointers = (source.data_ptr(), target.data_ptr())
    assert compiled[0].calls == [((16, 1, 1), (*pointers, 16, 16, False)), ((1, 1, 1), (*pointers, 1, 16, False))]


@pytest.mark.parametrize(
    "change",
    [
        {"source": torch.zeros(64, dtype=torch.float16)},
        {"target": torch.zeros(64, dtype=torch.int32)},
        {"total": 2**31},
        {"total": -(2**31) - 1},
        {"TILE": 32},
        {"TWICE": True},
        {"options": LaunchOptions(num_warps=8)},
        {"options": LaunchOptions(maxnreg=64)},
        {"options": LaunchOptions(enable_fp_fusion=False)},
    ],
    ids=str,
)
def test_whatever_changes_the_machine_code_is_compiled_for(
    compiled: list[CompiledKernel], change: dict[str, Any]
) -> None:
    usual = {"source": torch.zeros(64), "target": torch.zeros(64), "total": 3, "TILE": 16, "TWICE": False}
    for call in (usual, usual | change, usual, usual | change):
        source, target, total = (call[name] for name in ("source", "target", "total"))
        constants = {name: value for name, value in call.items() if name not in ("source", "target", "total")}
        launch(_copy_kernel, 1, source, target, total, **constants)
    assert [len(kernel.calls) for kernel in compiled] == [1, 1]


def test_a_tensor_that_is_not_aligned_is_our_own_bug(compiled: list[CompiledKernel]) -> None:
    with pytest.raises(AssertionError, match="_copy_kernel"):
        launch(_copy_kernel, 1, torch.zeros(64)[1:], torch.zeros(64), 3, TILE=16, TWICE=False)
    assert not compiled


def test_constants_out_of_order_are_our_own_bug(compiled: list[CompiledKernel]) -> None:
    with pytest.raises(AssertionError, match="out of order"):
        launch(_copy_kernel, 1, torch.zeros(64), torch.zeros(64), 3, TWICE=False, TILE=16)


def test_no_programs_no_launch(compiled: list[CompiledKernel]) -> None:
    launch(_copy_kernel, 0, torch.zeros(0), torch.zeros(0), 0, TILE=16, TWICE=False)
    assert not compiled


def test_intercepted_launches(compiled: list[CompiledKernel]) -> None:
    seen: list[Launch] = []
    with intercepted(seen.append):
        launch(_copy_kernel, 4, torch.zeros(64), torch.zeros(64), 60, TILE=16, TWICE=True)
    assert not compiled
    assert (seen[0].kernel, seen[0].programs, seen[0].constants) == (_copy_kernel, 4, {"TILE": 16, "TWICE": True})
    with intercepted(Launch.run):
        launch(_copy_kernel, 4, torch.zeros(64), torch.zeros(64), 60, TILE=16, TWICE=True)
    assert len(compiled) == 1


class OnGpu:
    """A tensor, as far as :func:`grid_stride_programs` looks at it."""

    def get_device(self) -> int:
        return 0


def test_four_rounds_of_what_is_resident_or_one_program_for_each_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_sms", lambda device_index: 132)  # of an H100
    monkeypatch.setattr(module, "_compute_capability", lambda device_index: 90)
    options = LaunchOptions(1, maxnreg=96)  # 20 programs on an SM
    programs = [grid_stride_programs(tiles, OnGpu(), options) for tiles in (0, 1, 2640, 10_559, 10_560, 10_561, 10**9)]
    assert programs == [0, 1, 2640, 10_559, 10_560, 10_560, 10_560]
    asked = [(1, 64), (1, 104), (1, 136), (4, 168), (8, 96)]
    programs = [grid_stride_programs(10**9, OnGpu(), LaunchOptions(*each)) for each in asked]
    assert programs == [528 * resident for resident in (32, 16, 12, 3, 2)]


@pytest.mark.parametrize(
    ("compute_capability", "registers", "resident"), [(80, 168, 12), (90, 128, 16), (100, 128, 16)]
)
def test_registers_of_an_architecture(
    monkeypatch: pytest.MonkeyPatch, compute_capability: int, registers: int, resident: int
) -> None:
    monkeypatch.setattr(module, "_sms", lambda device_index: 132)
    monkeypatch.setattr(module, "_compute_capability", lambda device_index: compute_capability)
    options = LaunchOptions(1, maxnreg=128, maxnreg_ampere=168)
    assert grid_stride_programs(10**9, OnGpu(), options) == 528 * resident
    assert options.for_triton(compute_capability) == {"num_warps": 1, "maxnreg": registers, "enable_fp_fusion": True}


def test_a_few_programs_in_the_interpreter() -> None:
    programs = [grid_stride_programs(tiles, torch.zeros(1), LaunchOptions(1, maxnreg=32)) for tiles in (0, 1, 2, 10**9)]
    assert programs == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [LaunchOptions(1), LaunchOptions(32, maxnreg=128)], ids=str)
def test_numbers_of_programs_that_nothing_is_known_about_are_our_own_bug(
    monkeypatch: pytest.MonkeyPatch, options: LaunchOptions
) -> None:
    monkeypatch.setattr(module, "_sms", lambda device_index: 132)
    monkeypatch.setattr(module, "_compute_capability", lambda device_index: 90)
    with pytest.raises(AssertionError, match="program"):
        grid_stride_programs(100, OnGpu(), options)
