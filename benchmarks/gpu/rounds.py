"""Times on the device: marks between pieces of work that is issued without waiting, read after one wait at the end."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

from timing import Laps

from gpu.device import Device

__all__ = ["Lap", "Step", "Turns", "in_turns", "timed"]

#: Ends a phase of a step and gives it its name.
Lap = Callable[[str], None]
#: Issues a step of a round, phase after phase.
Step = Callable[[int, Lap], None]

#: Steps that a contender runs one after the other when it has its turn. The first of them finds an idle device, which
#: then waits for the host; it does not count.
STEPS_PER_TURN = 3
#: Rounds that are run even when time is up.
LEAST_ROUNDS = 3


@dataclass
class Turns:
    """What :func:`in_turns` measured, by name of the contender.

    Attributes:
        laps: phases of the steps that count; ``laps[name][i]`` of all names belong to the same step.
        issue_seconds: of the host's time to issue a step, for each turn.
    """

    laps: dict[str, list[Laps]] = field(default_factory=dict)
    issue_seconds: dict[str, list[float]] = field(default_factory=dict)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps the garbage collector out of a measurement. Unlike its namesake for the CPU it does not collect before,
    which takes a tenth of a second: there are hundreds of measurements."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(
    device: Device,
    function: Callable[[int], Any],
    samples: int,
    repetitions: int = 1,
    warm_up: int = 2,
    before: Optional[Callable[[], Any]] = None,
) -> list[float]:
    """Times ``function(0)``, ``function(1)`` and so on, which have to issue work without waiting for it.

    Args:
        device: where the work is done, and waited for once, at the end.
        function: called ``(warm_up + samples) * repetitions`` times.
        samples: that count.
        repetitions: calls of one sample.
        warm_up: samples before those; compiling and the host's head start belong to them.
        before: issued before each sample, outside its time.

    Returns:
        Seconds of one call, for each sample.
    """
    device.synchronize()
    marks = []
    with _uncollected():
        for sample in range(warm_up + samples):
            if before is not None:
                before()
            start = device.mark()
            for call in range(sample * repetitions, (sample + 1) * repetitions):
                function(call)
            marks.append((start, device.mark()))
        device.synchronize()
    return [device.seconds_between(start, end) / repetitions for start, end in marks[warm_up:]]


def in_turns(
    device: Device, contenders: Mapping[str, Step], rounds: int, warm_up: int, deadline: float = float("inf")
) -> Turns:
    """Gives every contender a turn of :data:`STEPS_PER_TURN` steps in each round, in an order that turns around.

    The device is waited for once in each turn.

    Args:
        device: where the work is done.
        contenders: by name; each is called with the number of the step, the same for all in a turn.
        rounds: that count, at most.
        warm_up: rounds before them that do not.
        deadline: of ``time.perf_counter``; after it no round begins but the first :data:`LEAST_ROUNDS`.
    """
    turns = Turns({name: [] for name in contenders}, {name: [] for name in contenders})
    names = list(contenders)
    with _uncollected():
        for index in range(warm_up + rounds):
            if index >= warm_up + LEAST_ROUNDS and time.perf_counter() > deadline:
                break
            for name in reversed(names) if index % 2 else names:
                laps, issue_seconds = _turn(device, contenders[name], index * STEPS_PER_TURN)
                if index >= warm_up:
                    turns.laps[name] += laps[1:]
                    turns.issue_seconds[name].append(issue_seconds)
    return turns


def _turn(device: Device, step: Step, first: int) -> tuple[list[Laps], float]:
    """Laps of each step, and seconds that the host took to issue one."""
    steps: list[tuple[list[str], list[Any]]] = []
    device.synchronize()
    start = time.perf_counter()
    for index in range(first, first + STEPS_PER_TURN):
        names: list[str] = []
        marks = [device.mark()]

        def lap(name: str, names: list[str] = names, marks: list[Any] = marks) -> None:
            names.append(name)
            marks.append(device.mark())

        step(index, lap)
        steps.append((names, marks))
    issue_seconds = (time.perf_counter() - start) / STEPS_PER_TURN
    device.synchronize()
    laps = [
        {
            name: device.seconds_between(first_mark, second_mark)
            for name, (first_mark, second_mark) in zip(names, itertools.pairwise(marks), strict=True)
        }
        for names, marks in steps
    ]
    return laps, issue_seconds
