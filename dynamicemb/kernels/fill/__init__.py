"""First values of rows: a function of (seed, table, key, column) alone, the same bits from both engines.

Column ``c`` takes word ``c mod 4`` of Philox4x32-10 (Salmon et al. 2011) with the counter
``(key low, key high, c // 4, 0)`` and the table's 64-bit Philox key ``(low, high)``. The word ``x`` becomes
``u = (x + 0.5) / 2**32`` and, in float64 with no fused multiply-add, the value below, which is then rounded to float32
and, if need be, to the row's dtype (to nearest, ties to even).

The quantile of the normal distribution is Acklam's rational approximation (relative error below 1.2e-9), its logarithm
``e * ln 2 + 2 * artanh((m - 1) / (m + 1))`` as a series, so that it consists of correctly rounded operations only.
"""

from __future__ import annotations

import enum

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView, InitializerView, UniqueKeys

__all__ = ["DEBUG_MODULUS", "FillMode", "fill", "fill_missing"]

DEBUG_MODULUS = 100_000


class FillMode(enum.IntEnum):
    """How a value follows from ``u``; ``p0`` to ``p3`` are the table's four parameters."""

    #: ``p0``
    CONSTANT = 0
    #: ``p0 + (p1 - p0) * u``
    UNIFORM = 1
    #: ``p0 + p1 * quantile(u)``
    NORMAL = 2
    #: ``p0 + p1 * quantile(p2 + (p3 - p2) * u)``; p2 and p3 are the normal distribution's values at the bounds.
    TRUNCATED_NORMAL = 3
    #: ``key mod 100000``, never negative
    DEBUG = 4


# Quantile of the normal distribution: P. J. Acklam's algorithm. Numerators and denominators, highest power first.
QUANTILE_CENTRE_A = (-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02, 1.383577518672690e02,
                     -3.066479806614716e01, 2.506628277459239e00)  # fmt: skip
QUANTILE_CENTRE_B = (-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02, 6.680131188771972e01,
                     -1.328068155288572e01)  # fmt: skip
QUANTILE_TAIL_C = (-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e00, -2.549732539343734e00,
                   4.374664141464968e00, 2.938163982698783e00)  # fmt: skip
QUANTILE_TAIL_D = (7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e00, 3.754408661907416e00)
#: Below this probability, and above one minus it, the tail formula applies.
QUANTILE_TAIL = 0.02425
LN_2 = 0.6931471805599453
#: The least number of float64 with all bits, and what makes those below it so.
LEAST_NORMAL, TWO_TO_54 = 2.0**-1022, 2.0**54
SQRT_HALF = 0.7071067811865476
#: Terms of the series of artanh; |s| < 0.172, so the first one left out is below 1e-15.
LOG_TERMS = 9


def fill(view: GroupView, unique: UniqueKeys, slots: torch.Tensor, status: torch.Tensor, init: InitializerView) -> None:
    """Writes the first embedding and optimizer state of every key with status INSERTED or REPLACED.

    Args:
        view: the tables; rows change.
        unique: distinct keys.
        slots: int64 [U], their slot handles.
        status: int8 [U], a :class:`~dynamicemb.kernels.views.KeyStatus` each.
        init: the tables' initializers. Does not synchronise.
    """
    implementation(__name__, view.device).fill(view, unique, slots, status, init)


def fill_missing(
    rows: torch.Tensor,
    keys: torch.Tensor,
    tables: torch.Tensor,
    slots: torch.Tensor,
    init: InitializerView,
    dtype: torch.dtype,
) -> None:
    """Writes, for every key that has no slot, the embedding that it would begin with; all other rows stay as they are.

    Args:
        rows: float32 [N, dim], contiguous, dim a multiple of 4; changes.
        keys: int64 [N], repetitions allowed.
        tables: int32 [N].
        slots: int64 [N], slot handles; negative where the key is missing.
        init: the tables' initializers.
        dtype: float32, float16 or bfloat16: the precision that the tables store rows in, to which values are rounded.

    Does not synchronise. Where no key is missing it reads the slots and nothing else.
    """
    assert rows.is_contiguous() and rows.dtype == torch.float32
    implementation(__name__, rows.device).fill_missing(rows, keys, tables, slots, init, dtype)
