"""Topic: which kernels a training step and an evaluation consist of, and what each of them takes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from figures import CheckError, Figure, Spread

from dynamicemb.kernels.layout import OptimizerKind
from gpu import traffic
from gpu.device import KernelRun
from gpu.published import NAMES
from gpu.rounds import Step, in_turns
from gpu.sides import DRY, FULL, OPTIMIZERS, Pair, Size, memory_bytes
from gpu.tables import LOAD
from gpu.topic import Case, Context, Measured, Topic
from gpu.traffic import Traffic

__all__ = ["Share", "grouped", "shares", "topic"]

PROFILED_STEPS = 12
#: Kernels that run before the steps that count.
STEPS_BEFORE = 3
#: Names of kernels written in Triton here: those of Python functions.
_OURS = re.compile(r"_\w+_kernel(?:_\w+)?")
#: What other kernels belong to, by words in their names; the first that fits counts.
_GROUPS = (
    (re.compile(r"embedding|linearize|bounds_check|fbgemm", re.IGNORECASE), "fbgemm"),
    (re.compile(r"radix|sort", re.IGNORECASE), "sorting (cub)"),
    (re.compile(r"scan|runlength", re.IGNORECASE), "prefix sums (cub)"),
    (re.compile(r"memcpy|memset", re.IGNORECASE), "copies and fills"),
)
OTHERS = "element-wise and indexing (torch)"


@dataclass(frozen=True)
class Share:
    """What one kernel, or one group of them, takes of a step.

    Attributes:
        name: of the kernel or the group.
        seconds: of each step.
        launches: in a step.
    """

    name: str
    seconds: list[float]
    launches: float

    @property
    def mean(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds) / len(self.seconds)


def grouped(kernel: str) -> str:
    """The name of a kernel of ours, or the group that another one belongs to."""
    if _OURS.fullmatch(kernel):
        return kernel
    return next((group for pattern, group in _GROUPS if pattern.search(kernel)), OTHERS)


def shares(runs: Sequence[KernelRun], steps: int) -> list[Share]:
    """Takes ``steps`` equal steps apart, the dearest kernel first.

    A kernel that did not run equally often in all of them has one sample, its mean.

    Raises:
        CheckError: nothing ran.
    """
    if not runs:
        raise CheckError("the profiler saw no kernels")
    by_name: dict[str, list[float]] = {}
    for run in runs:
        by_name.setdefault(grouped(run.name), []).append(run.seconds)
    result = []
    for name, seconds in by_name.items():
        launches, rest = divmod(len(seconds), steps)
        samples = [sum(seconds) / steps] if rest else [sum(part) for part in batched(seconds, launches)]
        result.append(Share(name, samples, len(seconds) / steps))
    return sorted(result, key=lambda share: -share.mean)


def batched(values: list[float], size: int) -> list[list[float]]:
    """Neighbours, ``size`` at a time."""
    return [values[first : first + size] for first in range(0, len(values), size)]


def _training_work(size: Size, pair: Pair) -> dict[str, Traffic]:
    """Traffic of kernels of ours in a training step without misses, by a word in their name."""
    unique, layout, buckets = pair.unique, pair.dynamic.layout, pair.dynamic.buckets
    lines = traffic.touched_buckets(unique, buckets)
    return {
        "prefix": traffic.dedup_prefix(size.ids),
        "compare": traffic.dedup_compare(size.ids),
        "number": traffic.dedup_number(size.ids, unique),
        "find": traffic.find(unique, unique, LOAD, touched=lines, touch=True),
        "insert": traffic.insert(unique, 0, buckets),
        "fill": traffic.fill(unique, 0, layout),
        "tally": traffic.tally(unique, size.tables),
        "gather": traffic.gather(size.ids, unique, layout),
        "begin_update": traffic.begin_update(size.ids),  # before the word that its name has, too
        "update": traffic.update(size.ids, unique, layout),
    }


def _evaluation_work(size: Size, pair: Pair) -> dict[str, Traffic]:
    """The same for an evaluation."""
    return {
        "find": traffic.find_repeated(size.ids, pair.unique, LOAD),
        "gather": traffic.gather(size.ids, pair.unique, pair.dynamic.layout, through_inverse=False),
        "fill_missing": traffic.fill_missing(size.ids, 0, pair.dynamic.layout),
    }


def _share_figures(
    context: Context, name: str, parts: list[Share], work: dict[str, Traffic], array_bytes: float
) -> list[Figure]:
    total = sum(part.mean for part in parts)
    figures = []
    for part in parts:
        reason = f"{part.mean / total:.1%} of the kernels' time, {part.launches:g} launches"
        mine = next((moved for word, moved in work.items() if f"_{word}_" in part.name), None)
        label = f"{name}: {part.name}"
        figures.append(context.time_figure(label, part.seconds, mine, reason, array_bytes=array_bytes, unit="µs"))
    launches = Spread.exact(sum(part.launches for part in parts))
    return [*figures, Figure(f"{name}: launches, copies and fills included", "launches", launches)]


def _measure_side(
    context: Context, name: str, run: Step, work: dict[str, Traffic], array_bytes: float, size: Size, deadline: float
) -> Measured:
    """Kernels of a step, their sum, and the same step by the clock."""

    def one(index: int) -> None:
        run(index, lambda phase: None)

    for index in range(STEPS_BEFORE):
        one(index)
    parts = shares(context.device.profile(one, PROFILED_STEPS), PROFILED_STEPS)
    turns = in_turns(context.device, {"step": run}, size.rounds // 2, size.warm_up, deadline)
    by_clock = [sum(lap.values()) for lap in turns.laps["step"]]
    total = sum(part.mean for part in parts)
    figures = _share_figures(context, name, parts, work, array_bytes)
    figures += [
        context.time_figure(f"{name}: sum of the kernels", [total], unit="µs"),
        context.time_figure(f"{name}: step by events", by_clock, unit="µs"),
        Figure(f"{name}: kernels / step", "×", Spread.exact(total / Spread.of(by_clock).median)),
    ]
    return Measured(figures, {f"{name}, {part.name}, s": part.seconds for part in parts})


def _measure(context: Context, size: Size, kind: OptimizerKind, deadline: float) -> Measured:
    pair = Pair(size, kind, context.torch_device)
    total, training = Measured(), _training_work(size, pair)
    sides = [(f"{side} step", run, training) for side, run in pair.training().items()]
    if kind is OPTIMIZERS[0]:  # the same for all of them
        sides += [(f"{side}, evaluation", run, _evaluation_work(size, pair)) for side, run in pair.evaluation().items()]
    for side, run, work in sides:
        mine = work if side.startswith("dynamic") else {}
        measured = _measure_side(context, f"{NAMES[kind]}, {side}", run, mine, pair.metadata_bytes, size, deadline)
        total.figures += measured.figures
        total.series |= measured.series
    return total


def topic(context: Context) -> Topic:
    """One case for each optimizer."""
    size = DRY if context.dry else FULL
    cases = [
        Case(NAMES[kind], functools.partial(_measure, context, size, kind), 12, memory_bytes(size, kind))
        for kind in OPTIMIZERS
    ]
    return Topic(
        name="breakdown",
        title="Kernels of a step",
        setup=(
            f"The steps of the topic step, {PROFILED_STEPS} of them under torch's profiler; kernels of this package by "
            "their own names, those of torch and fbgemm by what they do. The sum of the kernels is compared with the "
            "same steps by events without the profiler: what the sum lacks are gaps between kernels, in which the "
            "device waits for the host."
        ),
        check="The profiler saw the kernels; a kernel with one sample did not run equally often in all steps.",
        cases=cases,
    )
