"""`make aot`: what it writes, and that it sees what must not be."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)

import aot
import triton
from ahead_of_time.architectures import ARCHITECTURES
from ahead_of_time.grouping import grouped, telling_names
from ahead_of_time.launches import Launch, recorded_launches
from ahead_of_time.machine_code import access_widths, machine_code, resources, spilled_bytes

from tests.kernels import toy_kernels, toy_races


@pytest.fixture(scope="module")
def toys() -> dict[str, Launch]:
    with recorded_launches() as launches:
        toy_kernels.launch_all()
    with recorded_launches() as racing:
        toy_races.launch_all(barrier=False)
    launches += [launch for launch in racing if launch.kernel in ("accumulate_kernel", "own_kernel")]
    return {launch.kernel: launch for launch in launches}


@pytest.fixture
def toys_alone(toys: dict[str, Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose kernels are the toys."""
    monkeypatch.setattr(aot, "launches_of", lambda choices: [*toys.values()])


PTX = """
	ld.param.b64 	%rd1, [_kernel_param_0];
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.v2.b64 { %rd2, %rd3 }, [ %rd1 + 16 ];
	@%p1 ld.global.L1::evict_last.L2::cache_hint.v8.b32 { %r1 }, [ %rd1 + 32 ], %rd9;
	ld.relaxed.gpu.global.u32 %r5, [%rd1];
	@%p2 ld.global.nc.b8 { %rs1 }, [ %rd1 + 0 ];
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r7];
	@%p1 st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
	st.global.f64 	[%rd1], %fd1;
	st.shared.b32 	[%r8], %r9;
	@%p3 red.global.gpu.relaxed.add.u64 [ %rd1 + 0 ], %rd2;
"""


def test_widths_are_read_from_every_form_of_an_access() -> None:
    assert access_widths(PTX) == (Counter({16: 3, 32: 1, 4: 1, 1: 1}), Counter({8: 2}))


def test_narrow_and_wide_accesses_are_told_apart(toys: dict[str, Launch]) -> None:
    narrow = machine_code(toys["narrow_kernel"], 90)
    assert narrow.loads == ((4, 4),) and narrow.stores == ((16, 1),)  # 512 values, 128 threads
    assert narrow.spilled_bytes == 0


@pytest.mark.parametrize("compute_capability", ARCHITECTURES)
def test_spills_are_seen(toys: dict[str, Launch], compute_capability: int) -> None:
    code = machine_code(toys["spilling_kernel"], compute_capability)
    assert code.registers <= 24 and code.spilled_bytes > 0
    assert code.warps == 1


LOCAL_MEMORY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u32 index)
{
	.local .align 4 .b8 memory[64];
	.reg .b32 %r<3>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [out];
	ld.param.u32 %r1, [index];
	ACCESS
	st.global.u32 [%rd1], %r1;
	ret;
}
"""
INDEXED = """mov.u64 %rd2, memory; mul.wide.u32 %rd3, %r1, 4; add.u64 %rd2, %rd2, %rd3;
	st.local.u32 [%rd2], %r1; ld.local.u32 %r1, [memory + 8];"""


@pytest.mark.parametrize(("access", "spilled"), [("", False), (INDEXED, True)])
def test_memory_that_nothing_touches_is_no_spill(access: str, spilled: bool, tmp_path: Path) -> None:
    ptx, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    ptx.write_text(LOCAL_MEMORY.replace("ACCESS", access))
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    subprocess.run([ptxas, "--gpu-name=sm_80", ptx, "-o", cubin], check=True)
    used = resources(cubin.read_bytes())
    assert used["STACK"] + used["LOCAL"] > 0
    assert (spilled_bytes(cubin.read_bytes(), used) > 0) == spilled


# (compute capability, registers, shared bytes, warps of a program), as cuda_occupancy.h of CUDA 12.8 computes it.
@pytest.mark.parametrize(
    ("kernel", "resident_warps"),
    [
        ((90, 32, 0, 4), 64), ((90, 33, 0, 4), 48), ((90, 96, 0, 4), 20), ((90, 128, 0, 8), 16), ((90, 255, 0, 16), 0),
        ((80, 32, 0, 1), 32), ((80, 16, 30_000, 4), 20), ((100, 16, 30_000, 4), 28), ((80, 200, 100_000, 4), 4),
        ((100, 72, 1024, 8), 24),
    ],
)  # fmt: skip
def test_resident_warps(kernel: tuple[int, int, int, int], resident_warps: int) -> None:
    assert ARCHITECTURES[kernel[0]].resident_warps(*kernel[1:]) == resident_warps


def test_columns_that_follow_from_others_are_left_out() -> None:
    settings = [{"TILE": 4, "DIM": dim, "COLUMNS": dim, "DTYPE": dtype} for dim in (8, 16) for dtype in (0, 1)]
    assert telling_names(settings) == ["DIM", "DTYPE"]
    assert telling_names(settings[:1]) == []


def test_lines_with_one_outcome_become_one_without_loss() -> None:
    outcomes = {(dim, dtype): "48" if (dim, dtype) == (32, 0) else "40" for dim in (8, 16, 32) for dtype in (0, 1)}
    lines = grouped([*outcomes], [(outcome,) for outcome in outcomes.values()])
    assert len(lines) == 3
    cells = [[cell.split(", ") for cell in line] for line in lines]
    meant = {
        (int(dim), int(dtype)): outcome
        for dims, dtypes, (outcome,) in cells
        for dim, dtype in itertools.product(dims, dtypes)
    }
    assert meant == outcomes


def test_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = ["--quick", "--kernel", "_mix_kernel", "--kernel", "_find_kernel", "--architecture", "90"]
    assert aot.main([*part, "--processes", "1", "--output", str(tmp_path)]) == 0
    data_file, text_file = sorted(tmp_path.iterdir())
    stem = f"aot-part-triton-{triton.__version__}-"
    assert data_file.name.startswith(stem) and data_file.suffix == ".json" and text_file.suffix == ".md"
    data = json.loads(data_file.read_text())
    assert data["triton"] == triton.__version__ and not data["complete"]
    assert data["kernels"].keys() == {"_mix_kernel", "_find_kernel"}
    first = data["kernels"]["_find_kernel"]["configurations"][0]
    assert {"CAPACITY", "TOUCH"} <= first["setting"].keys()
    assert 16 <= first["sm_90"]["registers"] <= 255 and first["sm_90"]["spilled_bytes"] == 0
    assert "| _find_kernel | sm_90 |" in text_file.read_text() and "\n## _find_kernel\n" in text_file.read_text()
    assert "All compile, none spills, and no warps race." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("toys_alone")
def test_problems_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--architecture", "80", "--processes", "2", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "spilling_kernel[TILE=1024], sm_80: spills" in said
    assert "broken_kernel[TILE=512], sm_80: CompilationError" in said
    assert "accumulate_kernel[COLUMNS=512, BARRIER=False], sm_80: no barrier between `ld" in said
    assert "Problems: 3." in said
    (file,) = tmp_path.glob("*.json")
    kernels = json.loads(file.read_text())["kernels"]
    assert "races" in kernels["accumulate_kernel"]["configurations"][0]["sm_80"]
    assert "races" not in kernels["own_kernel"]["configurations"][0]["sm_80"]
    assert "CompilationError" in kernels["broken_kernel"]["configurations"][0]["sm_80"]["problem"]
    assert "narrow_kernel" in kernels


def test_parts_are_written_where_they_are_told_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "RESULTS", tmp_path)
    assert aot.main(["--kernel", "_mix_kernel", "--architecture", "90", "--processes", "1"]) == 0
    assert not list(tmp_path.iterdir())


def test_unknown_kernels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--quick", "--kernel", "nothing"]) == 2
    assert "_mix_kernel" in capsys.readouterr().out
