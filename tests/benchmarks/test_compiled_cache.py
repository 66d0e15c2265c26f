"""Kernels compiled here are found by launches elsewhere: the real way of a launch, with a driver that stands in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in Triton's interpreter kernels are not compiled", allow_module_level=True)


from tests.benchmarks.conftest import BENCHMARKS
from tests.kernels.test_aot import other_triton
from tests.processes import python_path

ROOT = BENCHMARKS.parent
TOY = """
import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch

SCALE = tl.constexpr({scale})


@triton.jit
def _scaled(value):
    return value * SCALE


@triton.jit(do_not_specialize=["total"])
def _toy_kernel(values, total, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(values + at, _scaled(tl.load(values + at, mask=at < total, other=0)), mask=at < total)


def launches():
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.empty(1000, dtype=dtype, device="meta")
        options = LaunchOptions(num_warps=2, maxnreg=64, maxnreg_ampere=96)
        launch(_toy_kernel, 8, values, values.numel(), options=options, TILE=128)
"""
PACK = """
from pathlib import Path
from ahead_of_time.cache import make_archive
from {module} import launches
packed, compiled = make_archive(Path("kernels.tar.xz"), 90, 1, launches)
print(compiled, packed.kernels, packed.num_bytes)
"""
INSTALL = """
import json, sys
from pathlib import Path
from triton.runtime import cache
if {other_build}:
    own = cache.triton_key() + "-of another build"
    cache.triton_key = lambda: own
from quarter_hour.kernel_cache import install
installed = install(Path("kernels.tar.xz"))
from ahead_of_time.stand_in import stand_in
import {module}
from {module} import launches
{before}
with stand_in({compute_capability}) as counts:
    launches()
print(json.dumps({{**vars(counts), **vars(installed)}}))
"""
STEPS = """
from ahead_of_time.configurations import USUAL_LAYOUT, group_step


def launches():
    group_step(USUAL_LAYOUT)
"""


def run(folder: Path, script: str, cache: str, triton: Path | None = None) -> str:
    """What ``script`` prints, in ``folder``, with the cache of that name."""
    folders = [folder, ROOT, BENCHMARKS]
    environment = {**os.environ, "PYTHONPATH": python_path(*([triton] if triton else []), *folders)}
    environment["TRITON_CACHE_DIR"] = str(folder / cache)
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launched(
    folder: Path, module: str, cache: str = "there", other_build: bool = False, compute_capability: int = 90,
    triton: Path | None = None, before: str = "",
) -> dict[str, Any]:  # fmt: skip
    """What became of the launches of ``module`` in a fresh process after the archive was installed."""
    script = INSTALL.format(
        module=module, other_build=other_build, compute_capability=compute_capability, before=before
    )
    return json.loads(run(folder, script, cache, triton))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy kernel, and two compiled variants of it packed."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY.format(scale=3))
    compiled, kernels, num_bytes = map(int, run(folder, PACK.format(module="toy"), "here").split())
    assert compiled == kernels == 2 and num_bytes < 20_000
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("other_build", [False, True], ids=["this build", "another build"])
def test_launches_find_what_was_installed(toy: Path, other_build: bool) -> None:
    result = launched(toy, "toy", f"there-{other_build}", other_build)
    assert result["compiled"] == [] and result["found"] == ["_toy_kernel"] * 2 and result["launches"] == 2
    assert result["kernels"] == 2 and result["same_build"] is not other_build
    # Without what was compiled here: the code and what is known of it, and nothing else.
    suffixes = sorted(file.suffix for file in (toy / f"there-{other_build}").rglob("*") if file.is_file())
    assert suffixes == [".cubin"] * 2 + [".json"] * 4
    for suffix, reason in ((".source", "a run knows by it what it had to compile"), (".ptx", "others here read it")):
        assert len([*(toy / "here").rglob(f"*{suffix}")]) == 2, reason


@pytest.mark.slow
def test_kernels_are_found_whatever_was_launched_before(toy: Path) -> None:
    """A function that the kernel calls has been hashed, as it is when another kernel that calls it comes first."""
    assert launched(toy, "toy", "other order", before="toy._scaled.cache_key")["compiled"] == []


@pytest.mark.slow
def test_another_source_or_gpu_is_compiled_anew(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels.tar.xz").write_bytes((toy / "kernels.tar.xz").read_bytes())
    (tmp_path / "toy.py").write_text(TOY.format(scale=4).replace("SCALE = tl.constexpr(4)", "SCALE = tl.constexpr(3)"))
    assert launched(tmp_path, "toy")["compiled"] == []
    (tmp_path / "toy.py").write_text(TOY.format(scale=4))
    assert launched(tmp_path, "toy", "other source")["compiled"] == ["_toy_kernel"] * 2
    assert launched(toy, "toy", "other gpu", compute_capability=80)["compiled"] == ["_toy_kernel"] * 2
    kept = [json.loads(file.read_text()) for file in (toy / "other gpu").glob("*/_toy_kernel.json")]
    assert sorted(entry["maxnreg"] for entry in kept) == [64, 64, 96, 96], "those installed, and those compiled"


@pytest.mark.slow
def test_another_version_is_refused(toy: Path, tmp_path: Path) -> None:
    script = (
        "import sys, triton; triton.__version__ = '0.1'; from pathlib import Path\n"
        "from quarter_hour.kernel_cache import OtherTritonError, install\n"
        "try: install(Path('kernels.tar.xz'))\n"
        "except OtherTritonError as error: print(error)"
    )
    assert "make it again with that version" in run(toy, script, str(tmp_path))


@pytest.mark.slow
def test_a_step_with_the_oldest_triton(tmp_path: Path) -> None:
    """Every kernel of a training step, an evaluation and a doubling, by the version of a GPU machine."""
    triton = other_triton()
    if triton is None:
        pytest.skip("no other Triton beside the environment's")
    (tmp_path / "steps.py").write_text(STEPS)
    compiled, kernels, num_bytes = map(int, run(tmp_path, PACK.format(module="steps"), "here", triton).split())
    assert compiled == kernels >= 12 and num_bytes < 400_000
    result = launched(tmp_path, "steps", triton=triton)
    assert result["compiled"] == [] and len(result["found"]) == result["launches"] == kernels
