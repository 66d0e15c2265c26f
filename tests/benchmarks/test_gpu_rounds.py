"""Timing, on a device whose clock moves by as much as each piece of work is said to take."""

from __future__ import annotations

import time

import pytest
from gpu import rounds
from gpu.device import HostDevice
from gpu.rounds import Lap, in_turns, timed


class ScriptedDevice(HostDevice):
    """Work takes the seconds that :meth:`work` is told, all of it between the marks around it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.waits = 0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def mark(self) -> float:
        return self.now

    def seconds_between(self, first: float, second: float) -> float:
        return second - first

    def synchronize(self) -> None:
        self.waits += 1


def test_samples_leave_out_the_warm_up_and_what_comes_before_each() -> None:
    device = ScriptedDevice()
    calls: list[int] = []

    def function(index: int) -> None:
        calls.append(index)
        device.work(100.0 if index < 4 else float(index))

    seconds = timed(device, function, samples=2, repetitions=2, warm_up=2, before=lambda: device.work(1000.0))
    assert calls == list(range(8))
    assert seconds == pytest.approx([4.5, 6.5])
    assert device.waits == 2  # once before and once after


def test_contenders_take_turns_and_the_first_step_of_a_turn_does_not_count() -> None:
    device = ScriptedDevice()
    order: list[str] = []

    def contender(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def step(index: int, lap: Lap) -> None:
            order.append(f"{name}{index}")
            device.work(seconds)
            lap("forward")
            device.work(seconds * index)
            lap("backward")

        return step

    turns = in_turns(device, {"a": contender("a", 1.0), "b": contender("b", 2.0)}, rounds=1, warm_up=1)
    assert order == ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4", "b5", "a3", "a4", "a5"]
    assert turns.laps["a"] == [{"forward": 1.0, "backward": 4.0}, {"forward": 1.0, "backward": 5.0}]
    assert turns.laps["b"] == [{"forward": 2.0, "backward": 8.0}, {"forward": 2.0, "backward": 10.0}]
    assert len(turns.issue_seconds["a"]) == 1 and turns.issue_seconds["a"][0] >= 0


def test_time_that_is_up_ends_the_rounds_but_for_the_least() -> None:
    device = ScriptedDevice()
    turns = in_turns(
        device, {"a": lambda index, lap: lap("step")}, rounds=50, warm_up=1, deadline=time.perf_counter() - 1
    )
    assert len(turns.laps["a"]) == rounds.LEAST_ROUNDS * (rounds.STEPS_PER_TURN - 1)
