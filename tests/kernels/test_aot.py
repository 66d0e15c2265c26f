"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, spills nothing and moves 128 bits at a time."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.engine import ENGINE_VARIABLE
from dynamicemb.kernels.hashing import mix64
from dynamicemb.kernels.launch import Launch as Call
from dynamicemb.kernels.launch import intercepted
from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.kernels.occupancy import resident_programs
from dynamicemb.options import (
    BUCKET_CAPACITIES,
    EMBEDDING_DTYPES,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
)
from tests.kernels import toy_kernels
from tests.kernels.aot import (
    ARCHITECTURES,
    ROOT,
    Launch,
    code_of,
    compilations,
    compiled,
    every_launch,
    group_step,
    kernels,
    ptx_of,
    recorded_launches,
    sass,
    some_launches,
    variant,
    warps_that_fit,
    width_classes,
)
from tests.kernels.registers import CEILINGS
from tests.processes import python_path

#: Names a folder with another Triton; see the test that uses it.
OTHER_TRITON_VARIABLE = "DYNAMICEMB_OTHER_TRITON"
#: Warps are added to a multiprocessor in equal numbers for its four quarters. Compilers differ by a step.
STEP_OF_WARPS = 4
#: Row tiles that a kernel reads and writes at least, where everything is float32. An update reads gradients and rows.
ROW_TRAFFIC = {
    "_gather_kernel": (1, 1),
    "_gather_rows_kernel": (1, 1),
    "_block_sums_kernel": (1, 1),
    "_begin_update_kernel": (1, 1),
    "_sum_rows_kernel": (1, 1),
    "_update_kernel": (2, 1),
    "_fill_kernel": (0, 1),
    "_fill_missing_kernel": (0, 1),
    "_split_kernel": (1, 1),
}


def test_every_kernel_is_compiled() -> None:
    """A kernel that nothing here launches is launched by nothing in the package either, or needs a call in
    ``configurations.py``."""
    assert len(kernels()) > 10
    assert {launch.kernel for launch in some_launches()} == kernels()
    assert set(some_launches()) < set(every_launch())


def test_no_combination_of_choices_launches_anything_else() -> None:
    """Choices are not multiplied where they do not meet; this multiplies some of them. Splits have both a capacity and
    a row width, and are known to be listed in part."""
    choices = itertools.product(
        width_classes(), EMBEDDING_DTYPES, OptimizerKind, BUCKET_CAPACITIES, DynamicEmbEvictStrategy, (1, 700, 70_000),
        DynamicEmbInitializerMode,
    )  # fmt: skip
    chosen = random.Random(0).sample(list(choices), 60)
    with recorded_launches() as launches:
        for dim, dtype, optimizer, capacity, strategy, batch, mode in chosen:
            initializer = DynamicEmbInitializerArgs(mode, lower=-1.0, upper=1.0)
            group_step(RowLayout(dim, dtype, optimizer), capacity, strategy, batch, initializer=initializer)
    assert len(launches) > 200
    assert {launch.kernel for launch in set(launches) - set(every_launch())} <= {"_split_kernel"}


def test_kernels_are_compiled_as_a_launch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own reading of the arguments, host tensors in place of those of a GPU, gives what is compiled here."""
    calls: list[Call] = []
    monkeypatch.setenv(ENGINE_VARIABLE, "triton")
    with intercepted(calls.append):
        dedup(mix64(torch.arange(1000)), torch.zeros(1000, dtype=torch.int32), 3, 2)
        toy_kernels.launch(toy_kernels.scale_kernel, 1, torch.zeros(4), torch.zeros(4), 2**31, TILE=4)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    assert calls
    for call in calls:
        kernel, ours = call.kernel, Launch.of(call)
        keywords: dict[str, Any] = {**call.constants, **call.options.for_triton(90)}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*call.arguments, **keywords)
        options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
        assert signature == dict(ours.signature)
        assert {kernel.arg_names[number]: value for (number,), value in constants.items()} == dict(ours.constants)
        assert {number: values for number, values in attributes.items() if values} == ours.attributes
        assert options == backend.parse_options(ours.options_on(90))


def test_no_kernel_spills() -> None:
    codes = {(str(launch), architecture): code_of(launch, architecture) for launch, architecture in compilations()}
    assert {architecture for _, architecture in codes} == {80, 90, 100}
    assert not {where: code.spilled_bytes for where, code in codes.items() if code.spilled_bytes}


def test_registers_stay_below_ceilings() -> None:
    """And close: a kernel for which more warps fit than its ceiling and one step ask for has earned a lower one."""
    most: dict[str, int] = {}
    for launch, architecture in compilations():
        name = variant(launch)
        most[name] = max(most.get(name, 0), code_of(launch, architecture).registers)
    assert most.keys() == CEILINGS.keys()
    for kernel, used in most.items():
        assert used <= CEILINGS[kernel].registers, kernel
        assert warps_that_fit(used) <= CEILINGS[kernel].warps + STEP_OF_WARPS, kernel


@pytest.mark.parametrize(
    ("kernel", "constants", "warps"),
    [
        # Rows, gradients and states of as many keys under way as an SM has places for programs.
        ("_update_kernel", {"OPTIMIZER": int(OptimizerKind.ADAM), "DIM": 128, "DTYPE": 0}, 32),
        ("_insert_kernel", {}, 16),
    ],
)
def test_warps_of_an_h100(kernel: str, constants: dict[str, int], warps: int) -> None:
    launches = [launch for launch in some_launches() if launch.kernel == kernel]
    chosen = [launch for launch in launches if constants.items() <= dict(launch.constants).items()]
    assert chosen
    for launch in chosen:
        code = code_of(launch, 90)
        assert not code.spilled_bytes
        assert warps_that_fit(max(code.registers, launch.options_on(90)["maxnreg"])) >= warps, str(launch)


def test_an_update_waits_for_memory_three_times() -> None:
    """Offsets are asked for before the slot, and a row and both states before the positions of its gradients: what
    registers are too few for, ptxas moves down to where it is needed."""
    adam = {"OPTIMIZER": int(OptimizerKind.ADAM), "DIM": 128, "DTYPE": 0, "GRADIENT_DTYPE": 0}
    updates = [launch for launch in some_launches() if launch.kernel == "_update_kernel"]
    (launch,) = (launch for launch in updates if adam.items() <= dict(launch.constants).items())
    for architecture in ARCHITECTURES:
        offsets, rows, _ = sass(compiled(launch, architecture).asm["cubin"]).split("BAR.SYNC")
        assert len(re.findall(r"LDG\.E", offsets)) == 3  # the first is the number of entries
        assert len(re.findall(r"LDG\.E\.128", rows)) == 3


def shares_tiles(launch: Launch) -> bool:
    return "tl.num_programs(" in inspect.getsource(launch.function.fn)


def test_programs_that_a_launch_counts_on_are_resident() -> None:
    """What a limit of registers leaves room for, registers and shared memory of the machine code leave room for."""
    seen = set()
    for launch, architecture in compilations():
        if shares_tiles(launch):
            code, options = code_of(launch, architecture), launch.options_on(architecture)
            resident = ARCHITECTURES[architecture].resident_warps(code.registers, code.shared_bytes, code.warps)
            assert 0 < resident_programs(options["num_warps"], options["maxnreg"]) * code.warps <= resident, launch
            seen.add(launch.kernel)
    sharing = {
        "_find_kernel",
        "_insert_kernel",
        "_fill_kernel",
        "_fill_missing_kernel",
        "_update_kernel",
        "_sum_rows_kernel",
    }
    assert seen == sharing


def moves_rows(launch: Launch) -> bool:
    return not {"DIM", "ROW_BYTES"}.isdisjoint(dict(launch.constants))


def row_tile_and_width(launch: Launch, threads: int) -> tuple[int, int]:
    """Bytes of the narrowest rows that a program works on at a time, and how many of them one instruction can move.

    16, or less where a thread has less of the tile (four columns of a 16-bit row; a single narrow row), or where a mask
    cuts rows at other places: the power of two in their number of columns.
    """
    constants = dict(launch.constants)
    if launch.kernel == "_split_kernel":
        return constants["SLOTS"] * constants["WORDS"] * 4, 16
    halves = constants.get("DTYPE") or constants.get("GRADIENT_DTYPE") or "*i16" in dict(launch.signature).values()
    value_bytes = 2 if halves else 4
    tile_bytes = constants.get("ROWS", 1) * constants["COLUMNS"] * value_bytes
    return tile_bytes, min(16, tile_bytes // threads, (constants["DIM"] & -constants["DIM"]) * value_bytes)


def test_every_kernel_that_moves_rows_is_covered() -> None:
    assert {launch.kernel for launch in some_launches() if moves_rows(launch)} == ROW_TRAFFIC.keys()


@pytest.mark.parametrize("kernel", ROW_TRAFFIC)
def test_rows_move_128_bits_at_a_time(kernel: str) -> None:
    """The instructions that are as wide as can be are enough for all of a tile."""
    loaded, stored = ROW_TRAFFIC[kernel]
    for launch in (launch for launch in some_launches() if launch.kernel == kernel):
        code = code_of(launch, 90)
        threads = 32 * code.warps
        tile_bytes, widest = row_tile_and_width(launch, threads)
        for accesses, tiles in ((code.loads, loaded), (code.stores, stored)):
            moved = sum(width * count for width, count in accesses if width >= widest)
            assert moved * threads >= tiles * tile_bytes, f"{launch}: {accesses}"


@pytest.mark.parametrize("kernel", ["_fill_kernel", "_fill_missing_kernel", "_begin_update_kernel", "_update_kernel"])
def test_arithmetic_is_not_fused(kernel: str) -> None:
    """A fused multiply-add rounds once where the CPU engine rounds twice."""
    for launch in some_launches():
        if launch.kernel == kernel:
            ptx = ptx_of(launch)
            assert "fma.rn" not in ptx
            assert ".ftz" not in ptx and ".approx" not in ptx and "div.full" not in ptx


def test_rows_of_their_own_for_each_thread_have_more_registers_on_ampere() -> None:
    """Adam in rows of four 16-bit columns: Triton 3.9 spills 24 bytes with 80 registers there, and none with 96."""
    with recorded_launches() as launches:
        group_step(RowLayout(4, torch.float16, OptimizerKind.ADAM))
    (launch,) = (launch for launch in launches if launch.kernel == "_update_kernel")
    options = dict(launch.options)
    assert (options["maxnreg"], options["maxnreg_ampere"]) == (80, 96)
    assert all(code_of(launch, architecture).spilled_bytes == 0 for architecture in (80, 90))


def other_triton() -> Optional[Path]:
    """A folder with a Triton that is not the environment's: a given one, or the first of those beside it, where ``make
    test`` puts the oldest release that is supported."""
    given = os.environ.get(OTHER_TRITON_VARIABLE)
    folders = [Path(given).absolute()] if given else sorted(Path(sys.prefix).glob("triton-*[0-9]"))
    return next((folder for folder in folders if (folder / "triton").is_dir()), None)


@pytest.mark.slow
def test_kernels_compile_with_another_triton(tmp_path: Path) -> None:
    """The oldest version that is allowed, in a folder of its own (``pip install --no-deps --target FOLDER``): for all
    architectures, and nothing spills. ``make aot TRITON=...`` compiles all launches with any release."""
    folder = other_triton()
    if folder is None:
        pytest.skip(f"no other Triton in {sys.prefix}/triton-*; {OTHER_TRITON_VARIABLE} names another folder")
    command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), "--quick"]
    run = subprocess.run(
        [*command, "--processes", "1", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": python_path(folder, ROOT)}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["triton"] != triton.__version__
    assert result["kernels"].keys() == kernels()
