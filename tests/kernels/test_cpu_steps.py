"""The count of update steps on the CPU engine, and Adam's bias corrections against decimal arithmetic."""

from __future__ import annotations

import decimal
import math

import numpy as np
import pytest

from dynamicemb.kernels.steps.cpu import advance_steps

ALL = np.empty(0, np.bool_)
NO_CORRECTIONS = np.empty((0, 2), np.float32)
BETAS = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999999, 1 - 1e-8, 1 - 2**-53)
STEPS = (1, 2, 3, 7, 8, 50, 999, 1000, 65_535, 1_000_000, 10**9, 2**40 + 1)


def corrections(betas: list[tuple[float, float]], steps: list[int]) -> np.ndarray:
    """float32 [T, 2], of the steps that make the counts ``steps``."""
    numbers = np.zeros((len(betas), 5))
    numbers[:, 2:4] = betas
    counts = np.array(steps, np.int64) - 1
    result = np.empty((len(betas), 2), np.float32)
    advance_steps(counts, ALL, numbers, result)
    assert counts.tolist() == steps
    return result


def exactly(beta: float, step: int) -> decimal.Decimal:
    with decimal.localcontext() as context:
        context.prec = 80
        return 1 - decimal.Decimal(beta) ** step if beta else decimal.Decimal(1)


@pytest.mark.parametrize("beta", BETAS)
def test_bias_corrections_are_the_nearest_numbers(beta: float) -> None:
    """Within half a unit of float32, of which the error in float64 takes next to nothing."""
    found = corrections([(beta, 1.0)] * len(STEPS), list(STEPS))
    for step, (number, of_one) in zip(STEPS, found.tolist(), strict=True):
        wanted = exactly(beta, step)
        half_unit = math.ulp(float(wanted)) * 2 ** (52 - 23) / 2
        assert abs(decimal.Decimal(number) - wanted) <= decimal.Decimal(half_unit * (1 + 1e-5)), step
        assert of_one == 0.0, "1 ** t is 1"


def test_both_columns_of_each_table() -> None:
    betas, steps = [(0.9, 0.999), (0.0, 0.5), (0.5, 0.9)], [1, 3, 200]
    wanted = [[float(exactly(beta, step)) for beta in pair] for pair, step in zip(betas, steps, strict=True)]
    np.testing.assert_array_equal(corrections(betas, steps), np.array(wanted).astype(np.float32))


@pytest.mark.parametrize("takes_step", [[], [True, False, True], [False, False, False]])
def test_tables_that_take_no_step_are_not_counted(takes_step: list[bool]) -> None:
    steps = np.array([4, 0, 2**40], np.int64)
    advance_steps(steps, np.array(takes_step, np.bool_), np.zeros((3, 5)), NO_CORRECTIONS)
    added = takes_step or [True] * 3
    assert steps.tolist() == [4 + added[0], added[1], 2**40 + added[2]]
