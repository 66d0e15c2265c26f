"""Topic: a training step and an evaluation of ten tables, beside fbgemm's table-batched embedding with static ones."""

from __future__ import annotations

import functools

from figures import Figure, Spread, Target
from timing import Laps, ratio

from dynamicemb.kernels.layout import OptimizerKind
from gpu.published import NAMES, STEP_SOURCE, step_milliseconds, step_ratio
from gpu.rounds import Turns, in_turns
from gpu.sides import CHECK_RTOL, CHECK_STEPS, DRY, FULL, OPTIMIZERS, WITH_INITIALIZER, Pair, Size, memory_bytes
from gpu.static import why_no_static
from gpu.tables import LOAD
from gpu.topic import Case, Context, Measured, Topic

__all__ = ["topic"]

#: Of the time of the static tables. Half of what the published neighbour needs; 0.8 is hoped for.
TARGET_RATIO = 1.0
#: Of the time of an evaluation in which absent ids read as zeros.
INITIALIZER_TARGET_RATIO = 1.1

_LABELS = {"dynamic": "dynamic", WITH_INITIALIZER: WITH_INITIALIZER, "static": "TBE"}
_REASONS = {
    ("dynamic", "forward"): "one sort, one bucket for each distinct id, one row for each id",
    ("dynamic", "backward"): "each gradient read once, each distinct row and its state read and written",
    ("dynamic", "evaluation"): "one bucket for each distinct id, one row for each id",
    (WITH_INITIALIZER, "evaluation"): "the same, and the slot of each id once more",
    ("static", "forward"): "one row for each id",
    ("static", "backward"): "one sort, and as ours",
    ("static", "evaluation"): "one row for each id",
}


def _phase_figures(
    context: Context, size: Size, pair: Pair, kind: OptimizerKind, turns: Turns, phases: tuple[str, ...]
) -> list[Figure]:
    figures = []
    for side, laps in turns.laps.items():
        for phase in phases:
            name = "backward + update" if phase == "backward" else phase
            figures.append(
                context.time_figure(
                    f"{NAMES[kind]}: {_LABELS[side]}, {name}", [lap[phase] for lap in laps],
                    pair.traffic(size)[side][phase], _REASONS[side, phase], array_bytes=pair.metadata_bytes,
                    published=step_milliseconds(kind, side == "static", phase),
                )
            )  # fmt: skip
    return figures


def _step_figures(context: Context, size: Size, pair: Pair, kind: OptimizerKind, turns: Turns) -> list[Figure]:
    """Forward and backward together, the host's part in them, and the quotient that the target is about."""
    moved = pair.traffic(size)
    work = {side: moved[side]["forward"] + moved[side]["backward"] for side in turns.laps}
    figures = [
        context.time_figure(f"{NAMES[kind]}: {_LABELS[side]}, step", _steps(laps), work[side], "sum of both")
        for side, laps in turns.laps.items()
    ]
    figures += [
        context.time_figure(f"{NAMES[kind]}: {_LABELS[side]}, host's time to issue a step", seconds)
        for side, seconds in turns.issue_seconds.items()
    ]
    if "static" in turns.laps:
        seconds = {side: context.ceilings.seconds(traffic) for side, traffic in work.items()}
        mine, theirs = seconds["dynamic"], seconds["static"]
        expected = mine / theirs if mine is not None and theirs is not None else None
        figures.append(
            Figure(
                f"{NAMES[kind]}: dynamic / TBE, step", "×", ratio(turns.laps["dynamic"], turns.laps["static"]),
                expected, "quotient of the two expectations", Target(TARGET_RATIO, at_least=False),
                published=step_ratio(kind),
            )
        )  # fmt: skip
    return figures


def _steps(laps: list[Laps]) -> list[float]:
    return [sum(lap.values()) for lap in laps]


def _evaluation_ratios(context: Context, size: Size, pair: Pair, kind: OptimizerKind, turns: Turns) -> list[Figure]:
    zeros, values = (
        context.ceilings.seconds(pair.traffic(size)[side]["evaluation"]) for side in ("dynamic", WITH_INITIALIZER)
    )
    figures = [
        Figure(
            f"{NAMES[kind]}: evaluation, with an initializer / with zeros", "×",
            ratio(turns.laps[WITH_INITIALIZER], turns.laps["dynamic"]),
            values / zeros if values is not None and zeros is not None else None, "quotient of the two expectations",
            Target(INITIALIZER_TARGET_RATIO, at_least=False),
        )
    ]  # fmt: skip
    if "static" in turns.laps:
        spread: Spread = ratio(turns.laps["dynamic"], turns.laps["static"])
        figures.append(Figure(f"{NAMES[kind]}: dynamic / TBE, evaluation", "×", spread))
    return figures


def _series(kind: OptimizerKind, turns: Turns) -> dict[str, list[float]]:
    return {
        f"{NAMES[kind]}, {side}, {phase}, s": [lap[phase] for lap in laps]
        for side, laps in turns.laps.items()
        for phase in laps[0]
    }


def _measure(context: Context, size: Size, kind: OptimizerKind, deadline: float) -> Measured:
    pair = Pair(size, kind, context.torch_device)
    pair.check()
    training = in_turns(context.device, pair.training(), size.rounds, size.warm_up, deadline)
    evaluation = in_turns(context.device, pair.evaluation(), size.rounds // 2, size.warm_up, deadline)
    reason = why_no_static(kind, context.torch_device)
    left_out = {f"{NAMES[kind]}: TBE": reason} if reason else {}
    return Measured(
        [
            *_phase_figures(context, size, pair, kind, training, ("forward", "backward")),
            *_step_figures(context, size, pair, kind, training),
            *_phase_figures(context, size, pair, kind, evaluation, ("evaluation",)),
            *_evaluation_ratios(context, size, pair, kind, evaluation),
            Figure(f"{NAMES[kind]}: distinct ids of a step", "ids", Spread.exact(round(pair.unique))),
        ],
        _series(kind, training) | _series(kind, evaluation),
        left_out,
    )


def topic(context: Context) -> Topic:
    """One case for each optimizer."""
    size = DRY if context.dry else FULL
    cases = [
        Case(NAMES[kind], functools.partial(_measure, context, size, kind), 20, memory_bytes(size, kind))
        for kind in OPTIMIZERS
    ]
    return Topic(
        name="step",
        title="A training step of ten tables, beside fbgemm's static tables",
        setup=(
            f"{size.tables} tables in one group, dim {size.dim}, float32, {size.ids:,} ids a step from a power law "
            f"with exponent 1.05 over {size.rows:,} ids a table, all of them in the tables, which are filled to "
            f"{LOAD:.0%}; {size.batches} batches in rotation. Both sides take turns of three steps, the first of which "
            f"does not count; {size.rounds} rounds after {size.warm_up}. TBE: SplitTableBatchedEmbeddingBagsCodegen "
            "without pooling, weights in device memory, checks of ids off. In evaluation absent ids would read as "
            f"zeros; what an initializer costs where there are none has a figure of its own. {STEP_SOURCE}"
        ),
        check=(
            f"Rows of the first step equal bit for bit, of the {CHECK_STEPS - 1} after it and of an evaluation within "
            f"{CHECK_RTOL:g}; no id evicted or refused."
        ),
        cases=cases,
    )
