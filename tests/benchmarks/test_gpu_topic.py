"""Cases that fit, that do not, and that fail."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from figures import CheckError, Figure, Published, Spread, Target
from gpu.device import HostDevice, NeedsGpuError
from gpu.topic import SPARE_BYTES, Case, Measured, Topic, run_topic
from gpu.traffic import Traffic

from tests.benchmarks.pretended import PretendedGpu, context


def _case(name: str, seconds: float = 0.0, memory_bytes: float = 0.0) -> Case:
    return Case(name, lambda deadline: Measured([Figure(name, "ms", Spread.exact(1))]), seconds, memory_bytes)


def _raising(name: str, error: Exception) -> Case:
    def run(deadline: float) -> Measured:
        raise error

    return Case(name, run, 0.0)


def _topic(*cases: Case) -> Topic:
    return Topic("topic", "title", "setup", "check", cases)


def _soon() -> float:
    return time.perf_counter() + 5


def test_what_does_not_fit_is_named() -> None:
    device = PretendedGpu()
    free_bytes = device.free_bytes()
    topic = _topic(_case("large", memory_bytes=2 * free_bytes), _case("slow", seconds=60), _case("small"))
    outcome = run_topic(topic, device, _soon())
    assert outcome.findings is not None and not outcome.errors
    assert [figure.name for figure in outcome.findings.figures] == ["small"]
    assert "out of time: 60 s needed, 5 s left" in outcome.findings.left_out["slow"]
    assert "out of memory: " in outcome.findings.left_out["large"]


def test_a_case_needs_room_for_the_rest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device = PretendedGpu()
    monkeypatch.setattr(device, "free_bytes", lambda: 1000 + SPARE_BYTES)
    outcome = run_topic(_topic(_case("fits", memory_bytes=1000), _case("not", memory_bytes=1001)), device, _soon())
    assert outcome.findings is not None and list(outcome.findings.left_out) == ["not"]


def test_a_failed_check_refuses_the_topic() -> None:
    outcome = run_topic(_topic(_case("first"), _raising("second", CheckError("rows differ"))), PretendedGpu(), _soon())
    assert outcome.findings is None and outcome.refused == "second: rows differ"


def test_an_error_costs_one_case() -> None:
    topic = _topic(_raising("broken", ValueError("no\nsuch thing")), _case("whole"))
    outcome = run_topic(topic, PretendedGpu(), _soon())
    assert outcome.findings is not None
    assert [figure.name for figure in outcome.findings.figures] == ["whole"]
    assert outcome.findings.left_out == {"broken": "ended in an error: ValueError: no"}
    assert "such thing" in outcome.errors["broken"]


def test_what_only_a_gpu_has_is_left_out_on_the_host() -> None:
    outcome = run_topic(_topic(_raising("graph", NeedsGpuError("needs a GPU"))), HostDevice(), _soon())
    assert outcome.findings is not None and not outcome.errors
    assert outcome.findings.left_out == {"graph": "needs a GPU"}


@pytest.mark.parametrize("call", [HostDevice().capture, lambda step: HostDevice().profile(step, 1)])
def test_the_host_has_neither_graphs_nor_a_profile(call: Callable) -> None:
    with pytest.raises(NeedsGpuError):
        call(lambda *arguments: None)


def test_a_time_comes_with_what_moves_in_it() -> None:
    figure = context().time_figure("copy", [0.002, 0.004, 0.006], Traffic(1e6), "bytes")
    assert figure.unit == "ms" and figure.measured.median == pytest.approx(4.0)
    assert figure.expected == pytest.approx(1.0)  # a megabyte at a gigabyte a second
    assert figure.moved_bytes == 1e6 and figure.copy_share == pytest.approx(0.25)
    short = context().time_figure("copy", [0.002], Traffic(1e6), unit="µs")
    assert short.measured.median == pytest.approx(2000) and short.expected == pytest.approx(1000)
    assert short.copy_share == pytest.approx(0.5)


def test_a_rate_is_held_to_its_target() -> None:
    published = Published(2.0, "others")
    figure = context().rate_figure(
        "find", 1000, [1e-6, 2e-6], Traffic(500), target=Target(1.0, at_least=True), published=published
    )
    assert figure.measured.median == pytest.approx(0.75) and figure.met is False
    assert figure.expected == pytest.approx(1000 / 500) and figure.published == published
    assert figure.copy_share == pytest.approx(500 / (1000 / 0.75e9) / 1e9)
