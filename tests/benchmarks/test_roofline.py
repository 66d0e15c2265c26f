"""The predictions of docs/performance.md: up to date, and what the arithmetic on paper gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import roofline
import torch
from gpu import prediction, traffic
from gpu.prediction import H100, Chain, Compiled, Device, compiled
from gpu.published import NAMES
from gpu.traffic import SortWork, Traffic

from dynamicemb.kernels.layout import OptimizerKind, RowLayout

SGD, ADAM = OptimizerKind.SGD, OptimizerKind.ADAM
TOY = Device("toy", 1e12, 1e9, 1e-5, 1e-6, latency_seconds=1e-6, multiprocessors=10)


def test_the_page_shows_what_the_script_prints() -> None:
    page = roofline.PAGE.read_text()
    assert roofline.rewritten(page) == page, "run: python benchmarks/roofline.py --write"


def test_a_kernel_takes_what_its_parts_take() -> None:
    work = Traffic(2e6, {32: 3000, 128: 1e4}, (SortWork(1000, 4, 8),))
    # 2 MB and 1.28 MB at 1 TB/s, 3000 reads at 1 G/s, four passes, one launch.
    assert TOY.seconds(work) == pytest.approx(2e-6 + 1.28e-6 + 3e-6 + 4e-5 + 1e-6)


def test_a_kernel_takes_as_long_as_its_chain_of_loads() -> None:
    """10 multiprocessors hold 20 warps, 10 programs of two, each: 100 programs for 8,000 tiles, 80 each."""
    prediction = TOY.predicted(
        Traffic(2e6), Chain(16_000, 3), Compiled(tile=2, warps=2, resident_warps=20, registers=96)
    )
    assert prediction.seconds == prediction.by_latency == pytest.approx(1e-6 + 80 * 3 * 1e-6)
    assert prediction.by_memory == pytest.approx(3e-6) and prediction.limit == "latency"
    few = TOY.predicted(Traffic(2e9), Chain(3, 3), Compiled(2, 2, 20, 96))
    assert few.by_latency == pytest.approx(4e-6), "a tile alone takes its whole chain"
    assert few.seconds == few.by_memory and few.limit == "bytes"


def test_an_estimate_made_on_paper_came_to_the_same_time() -> None:
    """439 µs for the update of SGD on an H100, with five loads one after the other in 20 warps of a multiprocessor."""
    work = traffic.update(roofline.IDS, roofline.UNIQUE, RowLayout(128, torch.float32, SGD))
    prediction = H100.predicted(work, Chain(roofline.UNIQUE, 5), Compiled(1, 1, 20, 96))
    assert prediction.limit == "latency" and prediction.seconds == pytest.approx(439e-6, rel=0.1)


@pytest.mark.parametrize(("kind", "row_bytes"), [(SGD, 512), (ADAM, 1536)])
def test_rows_and_gradients_by_hand(kind: OptimizerKind, row_bytes: int) -> None:
    work = {(row.phase, row.kernel): row.work for row in roofline.phase_rows(kind)}
    ids, unique = 1_048_570, 350_000
    assert work["forward", "_gather_kernel"].num_bytes == pytest.approx(ids * (512 + 8) + unique * (512 + 8))
    rows = ids * 512 + unique * 2 * row_bytes
    assert work["backward", "_update_kernel"].num_bytes == pytest.approx(rows + ids * 8 + unique * (8 + 8 + 4))


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_an_evaluation_with_an_initializer_costs_little_more_than_with_zeros(kind: OptimizerKind) -> None:
    work = {row.kernel: row.work.num_bytes for row in roofline.phase_rows(kind) if "evaluation" in row.phase}
    zeros = work["_find_kernel"] + work["_gather_kernel"]
    assert zeros < zeros + work["_fill_missing_kernel"] < 1.1 * zeros
    for device in (roofline.H100, roofline.H200):
        zeros, values = (roofline.phase_seconds(device, kind, p) for p in ("evaluation", roofline.INITIALIZER))
        assert zeros < values < 1.1 * zeros


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_machine_code_is_found_for_every_kernel_that_waits(kind: OptimizerKind) -> None:
    for row in roofline.phase_rows(kind):
        code = row.code(kind)
        assert (code is not None) == (row.chain is not None), row.operation


def aot_results(folder: Path, version: str, date: str, registers: int, dim: int = 128, part: str = "") -> None:
    setting = {"DIM": dim, "ROWS": 2, "OPTIMIZER": 0}
    code = {"registers": registers, "warps": 1, "resident_warps": 20}
    configurations: list[dict[str, Any]] = [
        {"setting": {**setting, "DIM": 64}, "sm_90": {**code, "registers": 1}},
        {"setting": setting, "sm_80": code},
        {"setting": setting, "sm_90": code},
    ]
    kernels = {"_update_kernel": {"common": {"BLOCK": 128}, "configurations": configurations}}
    (folder / f"aot-{part}triton-{version}-{date}.json").write_text(json.dumps({"kernels": kernels}))


def test_machine_code_of_the_newest_results_that_have_it(tmp_path: Path) -> None:
    wanted = {"DIM": 128, "OPTIMIZER": 0, "DTYPE": 0}  # the kernel has no DTYPE
    assert compiled("_update_kernel", wanted, tmp_path) is None
    aot_results(tmp_path, "4.0.0", "2025-12-31", 4)
    assert compiled("_update_kernel", wanted, tmp_path) == Compiled(tile=2, warps=1, resident_warps=20, registers=4)
    for version, registers in (("3.10.0", 3), ("3.9.0", 2)):
        aot_results(tmp_path, version, "2026-01-02", registers, part="part-")
    assert compiled("_update_kernel", wanted, tmp_path) == Compiled(2, 1, 20, registers=3), "of 3.9 and 3.10"
    pinned = prediction._pinned_triton()
    aot_results(tmp_path, pinned, "2026-01-02", 5)
    assert compiled("_update_kernel", wanted, tmp_path) == Compiled(2, 1, 20, registers=5), "the pinned one"
    aot_results(tmp_path, pinned, "2026-01-03", 6, dim=256)
    assert compiled("_update_kernel", wanted, tmp_path) == Compiled(2, 1, 20, registers=5), "no newer one has it"
    assert compiled("_update_kernel", {"DIM": 512}, tmp_path) is None
    assert compiled("_other_kernel", wanted, tmp_path) is None


def results(folder: Path, topic: str, date: str, figures: list[tuple[str, str, float]]) -> None:
    plain = [{"name": name, "unit": unit, "measured": {"median": median}} for name, unit, median in figures]
    run = {"date": date, "accelerator": {"name": "NVIDIA H200"}, "findings": [{"figures": plain}]}
    (folder / f"{topic}-nvidia-h200-{date}.json").write_text(json.dumps(run))


def test_measured_kernels_stand_beside_the_predictions(tmp_path: Path) -> None:
    figures = [
        ("SGD, dynamic step: _gather_kernel", "µs", 345.6),
        ("SGD, static step: _gather_kernel", "µs", 1.0),
        ("SGD, dynamic, evaluation: _gather_kernel", "µs", 234.5),
        ("SGD, dynamic with an initializer, evaluation: _fill_missing_kernel", "µs", 12.3),
    ]
    results(tmp_path, "breakdown", "2026-01-02", figures)
    results(tmp_path, "breakdown", "2025-12-31", [(name, unit, 100 * median) for name, unit, median in figures])
    found = roofline.measured_kernels(SGD, "forward", tmp_path)
    assert {name: each.microseconds for name, each in found.items()} == {"_gather_kernel": 345.6}
    lines = [line for line in roofline.document("kernels", tmp_path).splitlines() if "| gather |" in line]
    sgd, adam, evaluation = lines
    assert "**346** (NVIDIA H200, 2026-01-02)" in sgd and "**234** (NVIDIA H200, 2026-01-02)" in evaluation
    assert roofline.NOT_MEASURED in adam
    assert "**12** (NVIDIA H200, 2026-01-02)" in roofline.document("kernels", tmp_path).splitlines()[-1]


@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_a_step_is_the_sum_of_its_phases(kind: OptimizerKind) -> None:
    forward, backward, step = (roofline.phase_seconds(roofline.H100, kind, phase) for phase in roofline.PHASES[:3])
    assert step == pytest.approx(forward + backward)
    line = next(line for line in roofline.document("at a glance").splitlines() if f"{NAMES[kind]}, step" in line)
    published = {SGD: ("1.92", "0.95"), ADAM: ("2.19", "1.35")}[kind]
    assert (line.split(" | ")[4], line.split(" | ")[6]) == published


def test_a_reader_sees_what_has_been_measured(tmp_path: Path) -> None:
    empty = roofline.document("at a glance", tmp_path).splitlines()
    assert "Nothing in this table has been measured" in empty[0]
    rows = [line for line in empty if line.startswith(("| SGD", "| Adam"))]
    assert [line.count(roofline.NOT_MEASURED) for line in rows] == 2 * [2, 2, 2, 2, 1]
    figures = [
        ("SGD: dynamic, forward", "ms", 0.456),
        ("SGD: TBE, backward + update", "ms", 0.321),
        ("SGD: dynamic with an initializer, evaluation", "ms", 0.234),
    ]
    results(tmp_path, "step", "2026-01-02", figures)
    head, *lines = roofline.document("at a glance", tmp_path).splitlines()
    assert "3 of 18" in head
    forward, backward = (next(line for line in lines if line.startswith(f"| SGD, {phase}")) for phase in ("fo", "ba"))
    assert forward.split(" | ")[3] == "**0.46** (NVIDIA H200, 2026-01-02)" and roofline.NOT_MEASURED in forward
    assert backward.rstrip(" |").endswith("**0.32** (NVIDIA H200, 2026-01-02)")
    assert any("initializer" in line and "**0.23** (NVIDIA H200" in line for line in lines)
    assert forward.split(" | ")[4] == "1.33" and forward.split(" | ")[6] == "0.34", "as published"
