"""The count of update steps on the CPU, and Adam's bias corrections; formulas: :mod:`dynamicemb.kernels.steps`."""

from __future__ import annotations

import numpy as np

from dynamicemb.kernels.numba_support import inline, kernel
from dynamicemb.kernels.update import HyperparameterColumn

__all__ = ["advance_steps"]

_BETA1, _BETA2 = np.int64(HyperparameterColumn.BETA1), np.int64(HyperparameterColumn.BETA2)


@inline
def _one_minus_power(beta, exponent):
    """``1 - beta ** exponent``, float64, as :mod:`dynamicemb.kernels.steps` says."""
    result, factor = 0.0, 1.0 - beta
    while exponent > 0:
        if exponent & 1 == 1:
            result += factor * (1.0 - result)
        factor *= 2.0 - factor
        exponent >>= 1
    return result


@kernel
def advance_steps(steps, takes_step, hyperparameters, corrections):
    """Counts a step of each table (of those that ``takes_step`` names, unless it is empty), and writes the bias
    corrections, float32 [T, 2], unless it is empty."""
    for table in range(steps.size):
        if takes_step.size == 0 or takes_step[table]:
            steps[table] += 1
    for table in range(corrections.shape[0]):
        corrections[table, 0] = np.float32(_one_minus_power(hyperparameters[table, _BETA1], steps[table]))
        corrections[table, 1] = np.float32(_one_minus_power(hyperparameters[table, _BETA2], steps[table]))
