"""The count of update steps on the GPU, and Adam's bias corrections; formulas: :mod:`dynamicemb.kernels.steps`."""

from __future__ import annotations

import triton
import triton.language as tl

from dynamicemb.kernels.update import HyperparameterColumn

__all__ = ["advance_steps"]

_HYPERPARAMETERS = tl.constexpr(len(HyperparameterColumn))
_BETA1 = tl.constexpr(int(HyperparameterColumn.BETA1))
assert HyperparameterColumn.BETA2 == HyperparameterColumn.BETA1 + 1


@triton.jit
def _one_minus_power(betas, exponents, greatest):
    """``1 - betas ** exponents``, float64, as :mod:`dynamicemb.kernels.steps` says. ``greatest``: exponent."""
    result = tl.zeros_like(betas)
    factor = 1.0 - betas
    while greatest > 0:
        result = tl.where((exponents & 1) == 1, result + factor * (1.0 - result), result)
        factor *= 2.0 - factor
        exponents >>= 1
        greatest >>= 1
    return result


@triton.jit
def advance_steps(steps, takes_step, hyperparameters, corrections, num_tables, some, adam, TILE: tl.constexpr):
    """Counts a step of each table, and writes the bias corrections, float32 [T, 2].

    ``some``: only of those that ``takes_step`` names. ``adam``: no corrections without it. Both are numbers, not
    constants, so that all optimizers share the machine code. No fma may be made of it.
    """
    for first in range(0, num_tables, TILE):
        table = first + tl.arange(0, TILE)
        inside = table < num_tables
        taken = inside
        if some != 0:
            taken = tl.load(takes_step + table, mask=inside, other=0) != 0
        step = tl.load(steps + table, mask=inside, other=0) + taken.to(tl.int64)
        tl.debug_barrier()  # several threads may have read the count that one of them writes
        tl.store(steps + table, step, mask=taken)
        if adam != 0:
            column = tl.arange(0, 2)[None, :]
            mask = inside[:, None] & (column >= 0)
            betas = hyperparameters + (table * _HYPERPARAMETERS + _BETA1)[:, None] + column
            correction = _one_minus_power(
                tl.load(betas, mask=mask, other=0.0), step[:, None] + tl.zeros_like(column), tl.max(step, axis=0)
            )
            tl.store(corrections + (table * 2)[:, None] + column, correction.to(tl.float32), mask=mask)
