"""The dictionary model's numbers: first values of rows, and optimizer steps in float64.

An independent Philox4x32-10 (Salmon et al. 2011, checked against the vectors that its authors publish), the documented
maps from its words to values, and the documented optimizer formulas. Vectorised over NumPy, float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)

CONSTANT, UNIFORM, NORMAL, TRUNCATED_NORMAL, DEBUG = range(5)
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = range(4)
NO_DECAY, L2, DECOUPLE = range(3)

# P. J. Acklam's approximation of the normal quantile, as its author publishes it.
CENTRE_NUMERATOR = (-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02, 1.383577518672690e02,
                    -3.066479806614716e01, 2.506628277459239e00)  # fmt: skip
CENTRE_DENOMINATOR = (-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02, 6.680131188771972e01,
                      -1.328068155288572e01, 1.0)  # fmt: skip
TAIL_NUMERATOR = (-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e00, -2.549732539343734e00,
                  4.374664141464968e00, 2.938163982698783e00)  # fmt: skip
TAIL_DENOMINATOR = (7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e00, 3.754408661907416e00, 1.0)
TAIL_BOUND = 0.02425


def philox(counter: Sequence[np.ndarray | int], key: Sequence[int]) -> list[np.ndarray]:
    """Ten rounds of Philox4x32: four counter words and two key words in, four words out; uint32 in uint64 arrays."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(PHILOX_FACTORS[0]), c2 * np.uint64(PHILOX_FACTORS[1])
        c0, c1, c2, c3 = (
            (product1 >> HALF) ^ c1 ^ np.uint64(k0),
            product1 & LOW,
            (product0 >> HALF) ^ c3 ^ np.uint64(k1),
            product0 & LOW,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & 0xFFFFFFFF, (k1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def uniforms(keys: Sequence[int], seed: int, dim: int) -> np.ndarray:
    """float64 [len(keys), dim], strictly between 0 and 1: column ``c`` from word ``c mod 4`` of block ``c // 4``."""
    bits = np.array(keys, dtype=np.int64).view(np.uint64)[:, None]
    block = np.arange(-(-dim // 4), dtype=np.uint64)[None, :]
    seed_bits = seed & (2**64 - 1)
    words = philox([bits & LOW, bits >> HALF, block, 0], [seed_bits & 0xFFFFFFFF, seed_bits >> 32])
    columns = np.stack(words, axis=-1).reshape(len(keys), -1)[:, :dim]
    return (columns.astype(np.float64) + 0.5) / 2.0**32


def _horner(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _tail_quantile(p: np.ndarray) -> np.ndarray:
    q = np.sqrt(-2.0 * np.log(p))
    return _horner(TAIL_NUMERATOR, q) / _horner(TAIL_DENOMINATOR, q)


def normal_quantile(p: np.ndarray) -> np.ndarray:
    """The value below which a standard normal variable lies with probability ``p``; relative error below 1.2e-9."""
    q = p - 0.5
    r = q * q
    centre = q * _horner(CENTRE_NUMERATOR, r) / _horner(CENTRE_DENOMINATOR, r)
    tail = np.where(q < 0, 1.0, -1.0) * _tail_quantile(np.minimum(p, 1.0 - p))
    return np.where((p < TAIL_BOUND) | (p > 1.0 - TAIL_BOUND), tail, centre)


def first_values(keys: Sequence[int], seed: int, mode: int, parameters: Sequence[float], dim: int) -> np.ndarray:
    """float32 [len(keys), dim]: the embeddings that these keys begin with, before they are rounded to a row's dtype."""
    p0, p1, p2, p3 = parameters
    u = uniforms(keys, seed, dim)
    if mode == CONSTANT:
        values = np.full_like(u, p0)
    elif mode == UNIFORM:
        values = p0 + (p1 - p0) * u
    elif mode == NORMAL:
        values = p0 + p1 * normal_quantile(u)
    elif mode == TRUNCATED_NORMAL:
        values = p0 + p1 * normal_quantile(p2 + (p3 - p2) * u)
    else:
        values = np.repeat(np.array([[float(key % 100_000)] for key in keys]).reshape(-1, 1), dim, axis=1)
    return values.astype(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, to nearest with ties to even, as float32 (no NaN among them)."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return (rounded << np.uint64(16)).astype(np.uint32).view(np.float32)


def to_float16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to float16, to nearest with ties to even, as float32."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class Numbers:
    """Hyperparameters of one table; ``step`` is its count of update steps, the one being made included, and ``mode``
    what weight decay does."""

    learning_rate: float
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    step: int = 1
    mode: int = NO_DECAY

    def at(self, step: int) -> Numbers:
        return replace(self, step=step)


def optimizer_step(
    kind: int, row: np.ndarray, state: np.ndarray, gradient: np.ndarray, numbers: Numbers
) -> tuple[np.ndarray, np.ndarray]:
    """One row after one step, and its state: float64, ``state`` laid out as :func:`optimizer_states` says."""
    w, s, g = (np.asarray(values, dtype=np.float64) for values in (row, state, gradient))
    if numbers.mode == L2:
        g = g + numbers.weight_decay * w
    decay = numbers.learning_rate * numbers.weight_decay * w if numbers.mode == DECOUPLE else 0.0
    if kind == ADAM:
        m, v = s[: len(w)], s[len(w) :]
        m = numbers.beta1 * m + (1.0 - numbers.beta1) * g
        v = numbers.beta2 * v + (1.0 - numbers.beta2) * g * g
        m_hat, v_hat = m / (1.0 - numbers.beta1**numbers.step), v / (1.0 - numbers.beta2**numbers.step)
        quotient = m_hat / (np.sqrt(v_hat) + numbers.eps)
        return w - numbers.learning_rate * quotient - decay, np.concatenate([m, v])
    if kind == SGD:
        return w - numbers.learning_rate * g - decay, s
    s = s + (g * g if kind == ADAGRAD else np.mean(g * g, keepdims=True))
    return w - numbers.learning_rate * g / (np.sqrt(s) + numbers.eps) - decay, s


def block_sum(rows: np.ndarray) -> np.ndarray:
    """Sum of one key's rows, float32 [n, D], in batch order: blocks of 128 on their own, then what is left."""
    total = np.zeros(rows.shape[1], np.float32)
    whole = len(rows) // 128 * 128
    for begin in range(0, whole, 128):
        block = np.zeros(rows.shape[1], np.float32)
        for row in rows[begin : begin + 128]:
            block += row
        total += block
    for row in rows[whole:]:
        total += row
    return total
