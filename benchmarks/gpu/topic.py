"""A topic as a list of cases that are run while there is time and memory, one after the other, each on its own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch
from figures import CheckError, Figure, Findings, Published, Spread, Target

from gpu.device import GIB, Device, NeedsGpuError
from gpu.limits import Ceilings
from gpu.traffic import Traffic

__all__ = ["Case", "Context", "Measured", "Outcome", "Topic", "run_topic"]

#: Memory that libraries, workspaces and fragmentation may take besides what a case says.
SPARE_BYTES = 2 * GIB
#: Of the time that a case takes on a GPU: what it takes on the host, in tiny sizes.
HOST_SHARE = 0.05


@dataclass
class Measured:
    """What a case found."""

    figures: list[Figure] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A part of a topic that can be left out.

    Attributes:
        name: of the part.
        run: measures it; its argument is the time (``time.perf_counter``) at which it should come to an end.
        seconds: that it takes on a GPU, estimated; there it is not begun with less than that left.
        memory_bytes: that it allocates at the same time, at most; 0 for next to nothing.
    """

    name: str
    run: Callable[[float], Measured]
    seconds: float
    memory_bytes: float = 0.0


@dataclass(frozen=True)
class Topic:
    """Attributes as of :class:`~figures.Findings`, and the cases."""

    name: str
    title: str
    setup: str
    check: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class Context:
    """What topics work with.

    Attributes:
        device: where the work is done.
        ceilings: of the device, as far as they have been measured.
        dry: whether tiny sizes are asked for.
    """

    device: Device
    ceilings: Ceilings
    dry: bool

    @property
    def torch_device(self) -> torch.device:
        return self.device.torch_device

    def time_figure(
        self,
        name: str,
        seconds: Sequence[float],
        traffic: Optional[Traffic] = None,
        reason: str = "",
        *,
        array_bytes: Optional[float] = None,
        published: Optional[Published] = None,
        unit: str = "ms",
    ) -> Figure:
        """A time in ``ms`` or ``µs``, with what memory makes of ``traffic`` as the expectation.

        ``array_bytes``: see :meth:`Ceilings.seconds`.
        """
        scale = {"ms": 1e3, "µs": 1e6}[unit]
        spread = Spread.of([scale * second for second in seconds])
        if traffic is None:
            return Figure(name, unit, spread, reason=reason, published=published)
        expected = self.ceilings.seconds(traffic, array_bytes)
        return Figure(
            name, unit, spread, None if expected is None else scale * expected, reason, None, traffic.num_bytes,
            self.ceilings.copy_share(traffic.num_bytes, spread.median / scale), published,
        )  # fmt: skip

    def rate_figure(
        self,
        name: str,
        keys: int,
        seconds: Sequence[float],
        traffic: Traffic,
        reason: str = "",
        *,
        array_bytes: Optional[float] = None,
        target: Optional[Target] = None,
        published: Optional[Published] = None,
    ) -> Figure:
        """Billions of keys a second, with the same expectation."""
        spread = Spread.of([1e-9 * keys / second for second in seconds])
        expected = self.ceilings.seconds(traffic, array_bytes)
        return Figure(
            name, "G keys/s", spread, None if expected is None else 1e-9 * keys / expected, reason, target,
            traffic.num_bytes, self.ceilings.copy_share(traffic.num_bytes, 1e-9 * keys / spread.median), published,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a topic.

    Attributes:
        findings: None if the check failed.
        refused: why there are none.
        errors: tracebacks of cases that ended in an error, by name; the findings name them too.
    """

    findings: Optional[Findings]
    refused: str = ""
    errors: dict[str, str] = field(default_factory=dict)


def _cannot_run(case: Case, device: Device, deadline: float) -> str:
    """Why ``case`` cannot be begun; nothing if it can."""
    seconds = deadline - time.perf_counter()
    needed = case.seconds if device.is_gpu else case.seconds * HOST_SHARE
    if seconds < needed:
        return f"out of time: {needed:.0f} s needed, {max(seconds, 0):.0f} s left for this topic"
    if device.is_gpu and case.memory_bytes:
        free_bytes = device.free_bytes()
        if free_bytes < case.memory_bytes + SPARE_BYTES:
            return f"out of memory: {case.memory_bytes / GIB:.0f} GiB needed, {free_bytes / GIB:.0f} GiB free"
    return ""


def _short(error: Exception) -> str:
    """Its kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def run_topic(topic: Topic, device: Device, deadline: float) -> Outcome:
    """Runs the cases. One that does not fit is named in the findings, and so is one that ends in an error.

    Args:
        topic: what to run.
        device: where the work is done.
        deadline: of ``time.perf_counter``.
    """
    total = Measured()
    errors: dict[str, str] = {}
    device.free_bytes()  # what the topic before has left
    for case in topic.cases:
        try:
            if reason := _cannot_run(case, device, deadline):
                total.left_out[case.name] = reason
                continue
            measured = case.run(deadline)
        except CheckError as failure:
            return Outcome(None, f"{case.name}: {failure}")
        except NeedsGpuError as failure:
            total.left_out[case.name] = str(failure)
        except Exception as error:  # what was measured before counts, and so do the cases to come
            total.left_out[case.name] = f"ended in an error: {_short(error)}"
            errors[case.name] = traceback.format_exc()
        else:
            total.figures += measured.figures
            total.series |= measured.series
            total.left_out |= measured.left_out
    findings = Findings(topic.name, topic.title, topic.setup, topic.check, total.figures, total.series, total.left_out)
    return Outcome(findings, errors=errors)
