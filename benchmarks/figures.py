"""What a benchmark finds: figures with their spread, what was expected of them, and what they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

__all__ = ["CheckError", "Figure", "Findings", "Published", "Spread", "Target"]


class CheckError(Exception):
    """The two sides of a comparison do not compute the same thing, so their times mean nothing."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of ``samples`` repetitions."""

    median: float
    p10: float
    p90: float
    samples: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        return Spread(float(median), float(p10), float(p90), len(values))

    @staticmethod
    def exact(value: float) -> Spread:
        """A number that repetition would not change."""
        return Spread(float(value), float(value), float(value), 1)


@dataclass(frozen=True)
class Target:
    """What the median is held to."""

    limit: float
    at_least: bool

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Published:
    """A number that others have published for the same work, and whose it is: system and hardware."""

    value: float
    whose: str

    def __str__(self) -> str:
        return f"{self.value:g} ({self.whose})"


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        name: what was measured.
        unit: of all its numbers; "×" for a ratio.
        measured: over the repetitions. A ratio is taken within each repetition, then summarised.
        expected: what was expected before measuring, in ``unit``.
        reason: where the expectation comes from.
        target: what the median must reach; None for figures that only explain.
        moved_bytes: read and written in one repetition, counted from the layout of what is read and written.
        copy_share: those bytes over the median time, as a share of the bandwidth of a copy in the same run.
        published: the same quantity elsewhere, in ``unit``.
    """

    name: str
    unit: str
    measured: Spread
    expected: Optional[float] = None
    reason: str = ""
    target: Optional[Target] = None
    moved_bytes: Optional[float] = None
    copy_share: Optional[float] = None
    published: Optional[Published] = None

    @property
    def met(self) -> Optional[bool]:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.target.met_by(self.measured.median)


@dataclass(frozen=True)
class Findings:
    """Everything one benchmark found.

    Attributes:
        name: of the benchmark, as on the command line.
        title: what it asks.
        setup: how it was measured, in sentences.
        check: what was found equal before anything was timed.
        figures: in the order in which they are shown.
        series: raw numbers by name, for those who want to look closer.
        left_out: why each part that was not measured was not, by name.
    """

    name: str
    title: str
    setup: str
    check: str
    figures: list[Figure]
    series: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
