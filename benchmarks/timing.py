"""Timing side by side: contenders take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from figures import Spread

__all__ = ["Contender", "Laps", "interleaved", "milliseconds", "ratio", "uncollected"]

#: Seconds by phase of one step.
Laps = dict[str, float]
#: Runs the step of a round and says how long each of its phases took.
Contender = Callable[[int], Laps]

#: OpenMP's idle threads spin for a few milliseconds after a parallel region, on cores that the next contender needs.
PAUSE_SECONDS = 0.01


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector out of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(contenders: Mapping[str, Contender], rounds: int, warm_up: int) -> dict[str, list[Laps]]:
    """Runs every contender once in each round, in an order that turns around from round to round.

    Args:
        contenders: by name; each is called with the number of the round.
        rounds: that count.
        warm_up: rounds before them that do not.

    Returns:
        Phases of the rounds that count, by name; ``laps[name][i]`` of all names belong to the same round.
    """
    forward, backward = list(contenders), list(reversed(list(contenders)))
    laps: dict[str, list[Laps]] = {name: [] for name in contenders}
    with uncollected():
        for index in range(warm_up + rounds):
            for name in backward if index % 2 else forward:
                time.sleep(PAUSE_SECONDS)
                elapsed = contenders[name](index)
                if index >= warm_up:
                    laps[name].append(elapsed)
    return laps


def _totals(laps: list[Laps], phase: str) -> list[float]:
    return [sum(lap.values()) if phase == "step" else lap[phase] for lap in laps]


def milliseconds(laps: list[Laps], phase: str = "step") -> Spread:
    """Spread of one phase, or of all of them together."""
    return Spread.of([1e3 * seconds for seconds in _totals(laps, phase)])


def ratio(numerator: list[Laps], denominator: list[Laps], phase: str = "step") -> Spread:
    """Spread of the quotient of one phase of two contenders, or of their whole steps, taken round by round."""
    return Spread.of([a / b for a, b in zip(_totals(numerator, phase), _totals(denominator, phase), strict=True)])
