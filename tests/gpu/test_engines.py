"""The Triton engine against the CPU engine on real hardware, at the sizes that it is for: every byte after each phase.

:mod:`tests.gpu.life` says what happens. The same scenarios run everywhere at toy size.
"""

from __future__ import annotations

import itertools

import pytest

from tests.gpu.cases import CHOICES, LARGE, MATRIX, Case, pairs
from tests.gpu.life import live
from tests.gpu.scale import INTERPRETED, SCALES, Scale

#: The interpreter takes minutes for all of them; the narrowest have every optimizer, policy and dtype.
CASES = [case for case in MATRIX if case.dim == 4] if INTERPRETED else MATRIX


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pair_of_choices(case: Case, scale: Scale) -> None:
    live(case, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_ten_million_rows(case: Case, scale: Scale) -> None:
    live(case, scale)


def test_the_cases_are_what_they_are_said_to_be() -> None:
    met = set()
    for case in MATRIX:
        met |= pairs([values.index(getattr(case, name)) for name, values in CHOICES.items()])
    options = [(choice, option) for choice, values in enumerate(CHOICES.values()) for option in range(len(values))]
    for first, second in itertools.combinations(options, 2):
        assert first[0] == second[0] or (*first, *second) in met
    for name in ("optimizer", "policy", "dtype"):
        assert {getattr(case, name) for case in MATRIX if case.dim == 4} == set(CHOICES[name])
    for case in LARGE:
        assert sum(config.max_capacity for config in case.configs()) >= 10**7
        assert int(case.rows * 1.1) >= 10**7, "keys that fill it"
