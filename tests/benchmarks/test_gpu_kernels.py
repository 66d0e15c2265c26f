"""The topics about single operations, dry: table, dedup, kernels, ceilings."""

from __future__ import annotations

import time
from types import ModuleType

import pytest
import torch
from gpu import ceilings, dedup, kernels, table
from gpu.device import HostDevice
from gpu.optimizer_formulas import updated
from gpu.topic import Outcome, run_topic

from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.table.optimizers import OptimizerConfig
from tests.benchmarks.pretended import context


def _outcome(topic: ModuleType, device: HostDevice | None = None) -> Outcome:
    here = context(device)
    return run_topic(topic.topic(here), here.device, time.perf_counter() + 1000)


def _figures(topic: ModuleType) -> dict:
    outcome = _outcome(topic)
    assert outcome.findings is not None and not outcome.errors and not outcome.findings.left_out, outcome
    return {figure.name: figure for figure in outcome.findings.figures}


def test_ceilings_are_measured_and_kept() -> None:
    here = context()
    outcome = run_topic(ceilings.topic(here), here.device, time.perf_counter() + 1000)
    assert outcome.findings is not None and not outcome.errors and not outcome.findings.left_out
    names = [figure.name for figure in outcome.findings.figures]
    assert names[0] == "copy, read + written" and len(names) == 1 + 2 * 2 + 2 * 4
    assert sorted(here.ceilings.random_reads_per_s) == sorted(ceilings.DRY.arrays_bytes)
    rates = here.ceilings.random_reads_per_s[ceilings.DRY.arrays_bytes[0]]
    assert sorted(rates) == [8, 32, 64, 128] and min(rates.values()) > 0
    assert sorted(here.ceilings.sort_seconds) == [4, 8]
    for seconds_by_count in here.ceilings.sort_seconds.values():
        assert sorted(seconds_by_count) == sorted(ceilings.DRY.sorted_keys)
        assert all(1e-7 < seconds < 1 for seconds in seconds_by_count.values())
    copy = outcome.findings.figures[0]
    assert here.ceilings.copy_bytes_per_s == pytest.approx(1e12 * copy.measured.median)
    assert copy.moved_bytes == 2 * ceilings.DRY.copied_bytes


def test_a_copy_that_copies_nothing_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "timed", lambda *arguments, **options: [1.0])
    assert "copy: the copy differs from its source" in _outcome(ceilings).refused


def test_every_operation_of_a_table_at_every_load() -> None:
    figures = _figures(table)
    operations = ["find", "find, after dedup", "find, rows", "find_or_insert", "find_or_insert, rows"]
    evictions = ["insert_and_evict", "insert_and_evict, rows"]
    names = [f"4,096 slots, dim 8, load 0.5: {name}" for name in operations]
    names += [f"4,096 slots, dim 8, load 1: {name}" for name in [*operations, *evictions]]
    assert list(figures) == ["dedup of 64 keys", *names]
    targets = {name: str(figure.target) for name, figure in figures.items() if figure.target}
    assert targets == {
        "4,096 slots, dim 8, load 0.5: find": "≥ 7",
        "4,096 slots, dim 8, load 0.5: find, after dedup": "≥ 7",
        "4,096 slots, dim 8, load 1: find": "≥ 7",
        "4,096 slots, dim 8, load 1: find, after dedup": "≥ 7",
        "4,096 slots, dim 8, load 1: insert_and_evict": "≥ 1.5",
    }
    assert all(figure.unit == "G keys/s" and figure.moved_bytes > 0 for figure in figures.values())


def test_published_numbers_stand_beside_the_same_work() -> None:
    assert table.hierarchical_kv("find", 64, 1.0).value == 1.97
    assert str(table.hierarchical_kv("find_or_insert", 32, 0.5)) == "4.85 (HierarchicalKV, H100 NVL)"
    assert table.hierarchical_kv("find", 128, 0.5) is None


def test_keys_found_elsewhere_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    find = table.find
    monkeypatch.setattr(table, "find", lambda view, batch: find(view, batch).roll(1))
    assert "a key was not found in the slot it is in" in _outcome(table).refused


def test_keys_that_are_not_inserted_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    insert = table.FullTable.find_or_insert

    def forgetful(self, unique, scores, rows=False):  # type: ignore[no-untyped-def]
        slots = insert(self, unique, scores, rows)
        if unique.keys.numel() == table.DRY.batch:  # not while it is filled
            self.restore()
        return slots

    monkeypatch.setattr(table.FullTable, "find_or_insert", forgetful)
    assert "an inserted key is not in the slot it was given" in _outcome(table).refused


def test_dedup_is_compared_with_torch_for_every_shape() -> None:
    figures = _figures(dedup)
    assert len(figures) == 4 * 4  # dedup, torch.unique, their quotient, the graph
    assert figures["512 ids, uniform, 2 tables: dedup as a graph"].measured.median > 0
    ratio = figures["512 ids, power law, 1 table: dedup / torch.unique"]
    assert ratio.target is not None and ratio.reason.endswith("distinct ids")


@pytest.mark.parametrize(
    ("field", "message"),
    [("inverse", "does not come back"), ("offsets", "counts differ"), ("count", "distinct ids, torch.unique finds")],
)
def test_a_wrong_dedup_is_not_reported(field: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dedup.dedup

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        result = vars(right(*arguments))
        changed = result[field] + 1 if field == "count" else result[field].roll(1)
        return UniqueKeys(**{**result, field: changed})

    monkeypatch.setattr(dedup, "dedup", wrong)
    assert message in _outcome(dedup).refused


def test_row_kernels_for_every_optimizer_dtype_and_law() -> None:
    figures = _figures(kernels)
    gathers = [name for name in figures if name.startswith(("gather", "expand"))]
    assert len(gathers) == 2 * 2 * 2 and len(figures) == 8 + 4 * 2 * 2
    figure = figures["update, Adam, bfloat16 rows of 8, power law"]
    assert figure.unit == "% of copy" and str(figure.target) == "≥ 75"
    assert figure.copy_share == pytest.approx(figure.measured.median / 100) and "times" in figure.reason


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_wrong_update_is_not_reported(kind: OptimizerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    update = kernels.update

    def eager(view, unique, slots, gradients, hyperparameters, steps, mode):  # type: ignore[no-untyped-def]
        change = 1.01 if view.layout.optimizer is kind else 1.0
        update(view, unique, slots, change * gradients, hyperparameters, steps, mode)

    monkeypatch.setattr(kernels, "update", eager)
    assert f"{kernels.NAMES[kind]}: " in _outcome(kernels).refused


@pytest.mark.parametrize(
    ("name", "message"), [("gather", "gathered rows differ"), ("gather_rows", "rows of a tensor differ")]
)
def test_a_wrong_gather_is_not_reported(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *arguments: gather(*arguments).roll(1, 0))
    assert message in _outcome(kernels).refused


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (OptimizerKind.SGD, lambda weights: torch.optim.SGD([weights], lr=0.1)),
        (OptimizerKind.ADAGRAD, lambda weights: torch.optim.Adagrad([weights], lr=0.1, eps=1e-8)),
        (OptimizerKind.ADAM, lambda weights: torch.optim.Adam([weights], lr=0.1, eps=1e-8)),
    ],
)
def test_formulas_are_those_of_torch(kind: OptimizerKind, make) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 4, dtype=torch.float64, generator=generator)
    theirs = torch.nn.Parameter(weights.clone())
    optimizer = make(theirs)
    states = torch.zeros(5, 8 if kind is OptimizerKind.ADAM else 4, dtype=torch.float64)
    for step in (1, 2, 3):
        theirs.grad = torch.rand(5, 4, dtype=torch.float64, generator=generator) - 0.5
        optimizer.step()
        weights, states = updated(weights, states, theirs.grad, OptimizerConfig(kind, 0.1), step)
    assert torch.allclose(weights, theirs)


def test_row_wise_adagrad_has_one_sum_for_a_row() -> None:
    gradients = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    weights, sums = updated(
        torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), gradients,
        OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD, 0.1), 1,
    )  # fmt: skip
    assert sums.item() == 12.5
    assert torch.allclose(weights, -0.1 * gradients / 12.5**0.5)
