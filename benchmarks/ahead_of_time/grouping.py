"""Many configurations in few lines, without loss: columns that tell nothing are left out, lines that differ in one
column alone become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["grouped", "telling_names"]


def telling_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names, in order, that are enough to tell all ``settings`` apart; what follows from others is left out.

    Later names are left out first, and the first one that varies never is.
    """
    names = [name for name in settings[0] if len({setting[name] for setting in settings}) > 1]
    for name in reversed(names[1:]):
        others = [other for other in names if other != name]
        if len({tuple(setting[other] for other in others) for setting in settings}) == len(settings):
            names = others
    return names


def grouped(settings: Sequence[tuple[Any, ...]], outcomes: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Lines of text that stand for all ``settings`` and their outcomes.

    A line's cells hold one value or several, and it stands for all combinations of them: all have its outcome.
    """
    lines = [(tuple((value,) for value in setting), outcome) for setting, outcome in zip(settings, outcomes)]
    for column in range(len(settings[0])):
        merged: dict[Any, tuple[Any, ...]] = {}
        for values, outcome in lines:
            rest = (values[:column], values[column + 1 :], outcome)
            merged[rest] = (*merged.get(rest, ()), *values[column])
        lines = [((*before, values, *after), outcome) for (before, after, outcome), values in merged.items()]
    return [[*(", ".join(str(value) for value in values) for values in line), *outcome] for line, outcome in lines]
