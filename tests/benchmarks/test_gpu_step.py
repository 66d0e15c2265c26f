"""The step beside fbgemm's tables, and its kernels, dry."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from gpu import breakdown, sides, static, step
from gpu.breakdown import OTHERS, grouped, shares
from gpu.device import HostDevice, KernelRun
from gpu.ids import Batch, IdSource
from gpu.sides import DRY, WITH_INITIALIZER
from gpu.tables import INITIALIZER, DynamicTables
from gpu.topic import Outcome, run_topic

from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig
from tests.benchmarks.pretended import KERNELS, PretendedGpu, context


def _outcome(device: HostDevice | None = None, topic: object = step) -> Outcome:
    here = context(device)
    return run_topic(topic.topic(here), here.device, time.perf_counter() + 1000)  # type: ignore[attr-defined]


def test_compares_both_sides_where_fbgemm_has_the_optimizer() -> None:
    outcome = _outcome(HostDevice())
    assert outcome.findings is not None and not outcome.errors
    figures = {figure.name: figure for figure in outcome.findings.figures}
    assert outcome.findings.left_out == {"Adam: TBE": "fbgemm has no such optimizer on the CPU"}
    for side in ("dynamic", "TBE"):
        for phase in ("forward", "backward + update", "step", "evaluation", "host's time to issue a step"):
            assert figures[f"SGD: {side}, {phase}"].measured.median > 0
    ratio = figures["SGD: dynamic / TBE, step"]
    assert ratio.target is not None and ratio.measured.samples == DRY.rounds * 2  # steps of a turn but the first
    assert ratio.published is not None and ratio.published.value == pytest.approx((1.33 + 0.59) / 0.95, abs=0.01)
    assert figures["SGD: dynamic, forward"].published.value == 1.33
    assert figures["SGD: TBE, evaluation"].published.value == 0.41
    price = figures["SGD: evaluation, with an initializer / with zeros"]
    assert str(price.target) == "≤ 1.1" and price.measured.median > 0 and 1 < price.expected < 1.1
    forward = figures["Adam: dynamic, forward"]
    assert forward.moved_bytes > DRY.ids * DRY.dim * 4 and forward.copy_share > 0 and forward.expected > 0


def test_measures_our_side_where_fbgemm_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_fbgemm", lambda: OSError("libnvidia-ml.so.1: not found\nand more"))
    outcome = _outcome(HostDevice())
    assert outcome.findings is not None and not outcome.errors
    assert outcome.findings.left_out["SGD: TBE"] == "fbgemm cannot be loaded: OSError: libnvidia-ml.so.1: not found"
    names = {figure.name for figure in outcome.findings.figures}
    assert "SGD: dynamic, forward" in names and not any("TBE" in name for name in names)


def _replace_static(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    make = sides.static_tables
    monkeypatch.setattr(sides, "static_tables", lambda *arguments: change(make, *arguments))  # type: ignore[operator]


def test_reports_nothing_when_the_sides_start_from_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(make, *arguments):  # type: ignore[no-untyped-def]
        module = make(*arguments)
        module.split_embedding_weights()[1][7:].add_(1e-3)
        return module

    _replace_static(monkeypatch, shifted)
    assert "SGD: rows of step 0 differ from fbgemm's by up to 0.001" in _outcome().refused


def test_reports_nothing_when_the_sides_learn_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(make, dynamic, source, optimizer, device):  # type: ignore[no-untyped-def]
        return make(dynamic, source, OptimizerConfig(optimizer.kind, 1.001 * optimizer.learning_rate), device)

    _replace_static(monkeypatch, faster)
    assert "SGD: rows of step 1 differ from fbgemm's" in _outcome().refused


def test_evaluation_is_compared_without_an_initializer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which static tables have no counterpart; what it costs is measured beside them."""
    pair = sides.Pair(DRY, OptimizerKind.SGD, context().torch_device)
    batch = pair.batches[0]
    absent = Batch(batch.ids + DRY.rows, batch.tables)
    assert pair.dynamic.read(absent).count_nonzero() == 0
    assert pair.dynamic.read_with_initializer(absent).count_nonzero() > 0.99 * DRY.ids * DRY.dim
    fills: list[str] = []
    for module in ("gpu.tables", "dynamicemb.table.group"):
        monkeypatch.setattr(f"{module}.fill_missing", lambda *arguments, module=module: fills.append(module))
    by_side: dict[str, list[str]] = {}
    for side, step_of_side in pair.evaluation().items():
        step_of_side(0, lambda phase: None)
        by_side[side] = fills[:]
        fills.clear()
    assert by_side == {"dynamic": [], WITH_INITIALIZER: ["gpu.tables"], "static": []}


def test_reading_with_an_initializer_is_what_a_group_with_one_does() -> None:
    device = context().torch_device
    source, tables = IdSource(2, 300, device), DynamicTables(2, 300, 8, OptimizerConfig(OptimizerKind.SGD), device)
    configs = [dataclasses.replace(config, eval_initializer=INITIALIZER) for config in tables.group.configs]
    group = TableGroup(configs, 1, device)
    every = source.every(0, 300)
    tables.group.train_lookup(every.ids, every.tables)
    group.train_lookup(every.ids, every.tables)
    half_absent = Batch(every.ids + every.ids % 2 * 300, every.tables)
    expected = group.eval_lookup(half_absent.ids, half_absent.tables)
    assert torch.equal(tables.read_with_initializer(half_absent), expected)
    assert not torch.equal(tables.read(half_absent), expected)


def test_reports_nothing_when_ids_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.tables.capacity_for", lambda rows: rows // 2)
    assert "lost their place" in _outcome().refused


def test_the_kernels_of_a_step_are_taken_apart() -> None:
    outcome = _outcome(topic=breakdown)
    assert outcome.findings is not None and not outcome.errors and not outcome.findings.left_out
    figures = {figure.name: figure for figure in outcome.findings.figures}
    gather = figures["SGD, dynamic step: _gather_kernel"]
    assert gather.unit == "µs" and gather.measured.median == pytest.approx(50) and gather.measured.samples == 12
    assert gather.moved_bytes is not None and gather.reason == "68.5% of the kernels' time, 2 launches"
    assert figures["SGD, dynamic step: sorting (cub)"].measured.median == pytest.approx(20)
    assert figures["SGD, dynamic step: sum of the kernels"].measured.median == pytest.approx(73)
    assert figures["SGD, dynamic step: launches, copies and fills included"].measured.median == len(KERNELS)
    by_events = figures["SGD, dynamic step: step by events"].measured.median
    assert figures["SGD, dynamic step: kernels / step"].measured.median == pytest.approx(73 / by_events)
    assert figures["SGD, static step: _find_kernel"].moved_bytes is None  # that is not a static table's
    for side in ("dynamic", WITH_INITIALIZER, "static"):
        assert f"SGD, {side}, evaluation: _find_kernel" in figures
        assert f"Adam, {side}, evaluation: _find_kernel" not in figures


def test_the_breakdown_needs_a_gpu() -> None:
    outcome = _outcome(HostDevice(), breakdown)
    assert outcome.findings is not None and not outcome.findings.figures
    assert set(outcome.findings.left_out) == {"SGD", "Adam"}


def test_a_profile_without_kernels_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretendedGpu, "profile", lambda device, function, steps: [])
    assert "the profiler saw no kernels" in _outcome(topic=breakdown).refused


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_update_kernel", "_update_kernel"),
        ("void at_cuda_detail::cub::DeviceRadixSortHistogramKernel<policy, false, long, int>(int*)", "sorting (cub)"),
        ("void at_cuda_detail::cub::DeviceScanKernel<policy, long const*>(long)", "prefix sums (cub)"),
        ("split_embedding_nobag_backward_codegen_sgd_unweighted_kernel_warp_per_row_1", "fbgemm"),
        ("void linearize_index_kernel<long, unsigned int>(at::GenericPackedTensorAccessor<long>)", "fbgemm"),
        ("Memset (Device)", "copies and fills"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::index_elementwise_kernel<128, 4>(long)", OTHERS),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, group: str) -> None:
    assert grouped(kernel) == group


def test_shares_are_by_step_and_dearest_first() -> None:
    names = ["_a_kernel", "_b_kernel", "_b_kernel"] * 2
    runs = [KernelRun(name, index, 1.0 + index) for index, name in enumerate(names)]
    dearest, other = shares([*runs, KernelRun("Memset (Device)", 9, 3.0)], steps=2)[:2]
    assert dearest.name == "_b_kernel" and dearest.seconds == [5.0, 11.0] and dearest.launches == 2
    assert other.name == "_a_kernel" and other.seconds == [1.0, 4.0] and other.mean == 2.5
    (once,) = shares([KernelRun("Memset (Device)", 9, 3.0)], steps=2)
    assert once.seconds == [1.5] and once.launches == 0.5


def test_memory_is_foreseen() -> None:
    pair = sides.Pair(DRY, OptimizerKind.SGD, context().torch_device)
    static = sum(weight.nbytes for weight in pair.static.split_embedding_weights())
    assert sides.memory_bytes(DRY, OptimizerKind.SGD) >= pair.dynamic.num_bytes + static + 4 * pair.gradient.nbytes
