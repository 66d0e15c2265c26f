"""The model of many features, dry and on a pretended GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from gpu import model, sharded_model
from gpu.device import HostDevice
from gpu.topic import Outcome, run_topic

from tests.benchmarks.pretended import PretendedGpu, context


def _outcome(device: HostDevice, *only: str) -> Outcome:
    here = context(device)
    topic = model.topic(here)
    cases = [case for case in topic.cases if not only or case.name in only]
    return run_topic(type(topic)(topic.name, topic.title, topic.setup, topic.check, cases), device, _later())


def _later() -> float:
    return time.perf_counter() + 1000


@pytest.mark.slow
def test_compares_both_sides_eagerly_and_through_torchrec() -> None:
    outcome = _outcome(HostDevice())
    assert outcome.findings is not None and not outcome.errors, outcome.errors
    assert set(outcome.findings.left_out) == {"CUDA graph, dynamic", "CUDA graphs, both sides"}
    figures = {figure.name: figure for figure in outcome.findings.figures}
    for way, other in (("eager", "TBE"), ("DistributedModelParallel", "static")):
        for side in ("dynamic", other):
            for phase in ("forward", "backward", "step", "host's time to issue a step"):
                assert figures[f"{way}, {side}, {phase}"].measured.median > 0
        assert figures[f"{way}, dynamic / {other}"].unit == "×"


def test_a_graph_is_replayed_on_the_samples_of_the_moment() -> None:
    outcome = _outcome(PretendedGpu(), "CUDA graph, dynamic", "CUDA graphs, both sides")
    assert outcome.findings is not None and not outcome.errors and not outcome.findings.left_out, outcome
    assert [figure.name for figure in outcome.findings.figures if figure.unit == "×"] == [
        "dynamic, CUDA graph / eager",
        "CUDA graph, dynamic / TBE",
    ]


class Stale(PretendedGpu):
    """Graphs that do nothing when they are replayed."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        super().capture(function)
        return lambda: None


class Untrained(PretendedGpu):
    """Graphs that compute the loss and update nothing."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        super().capture(function)

        def replay() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(model.Trainer, "backward", lambda trainer, loss: None)
                function()

        return replay


@pytest.mark.parametrize(
    ("device", "message"),
    [(Stale(), "the loss of a replayed step is"), (Untrained(), "a replayed step changes no row")],
)
def test_a_graph_that_does_not_train_is_not_reported(device: PretendedGpu, message: str) -> None:
    assert message in _outcome(device, "CUDA graph, dynamic").refused


def test_sides_that_learn_differently_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    make = model.static_tables

    def other_rows(*arguments):  # type: ignore[no-untyped-def]
        module = make(*arguments)
        for weight in module.split_embedding_weights():
            weight.mul_(-30.0)
        return module

    monkeypatch.setattr(model, "static_tables", other_rows)
    assert "rows after step 0 differ by up to 0." in _outcome(HostDevice(), "eager").refused


def test_a_sharded_model_without_every_id_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_model, "_insert_every", lambda *arguments: None)
    outcome = _outcome(HostDevice(), "DistributedModelParallel")
    assert f"holds 0 of {model.DRY.rows} ids" in outcome.refused
    assert not torch.distributed.is_initialized()


def test_a_capture_that_fails_costs_its_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: PretendedGpu, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(PretendedGpu, "capture", fails)
    outcome = _outcome(PretendedGpu(), "eager", "CUDA graph, dynamic")
    assert outcome.findings is not None and outcome.findings.figures
    assert "not permitted when stream is capturing" in outcome.findings.left_out["CUDA graph, dynamic"]
    assert list(outcome.errors) == ["CUDA graph, dynamic"]
