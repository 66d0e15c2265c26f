"""Optimizer steps on the CPU: sum the gradients of a key, then change its row once."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.numba_support import (
    as_float32,
    inline,
    kernel,
    parallel_for,
    prefetch_to_write,
    rows_ahead,
    stack_bytes,
)
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, FLOAT32, MAX_ROW_BYTES, read_row, sum_rows, write_row
from dynamicemb.kernels.steps.cpu import advance_steps
from dynamicemb.kernels.update import HyperparameterColumn, WeightDecayMode
from dynamicemb.kernels.views import AddressRow, GroupView, UniqueKeys

_ROWS = np.int64(AddressRow.ROWS)
_LR, _EPS = np.int64(HyperparameterColumn.LEARNING_RATE), np.int64(HyperparameterColumn.EPS)
_BETA1, _BETA2 = np.int64(HyperparameterColumn.BETA1), np.int64(HyperparameterColumn.BETA2)
_DECAY = np.int64(HyperparameterColumn.WEIGHT_DECAY)
_L2, _DECOUPLE = np.int64(WeightDecayMode.L2), np.int64(WeightDecayMode.DECOUPLE)
_SGD, _ADAGRAD = np.int64(OptimizerKind.SGD), np.int64(OptimizerKind.ADAGRAD)
_ALL_TABLES = np.empty(0, np.bool_)
_ROWWISE_ADAGRAD = np.int64(OptimizerKind.ROWWISE_ADAGRAD)


# Rows, gradients and states are float32 pointers with ``dim`` values.


@inline
def _sgd(weights, gradient, dim, rate):
    for i in range(dim):
        weights[i] -= rate * gradient[i]


@inline
def _adagrad(weights, gradient, dim, total, rate, eps):
    for i in range(dim):
        total[i] += gradient[i] * gradient[i]
        weights[i] -= rate * gradient[i] / (math.sqrt(total[i]) + eps)


@inline
def _sum_of_squares(values, dim):
    """In four partial sums, so that additions do not wait for each other; ``dim`` is a multiple of 4."""
    a = b = c = d = np.float32(0)
    for i in range(0, dim, 4):
        a += values[i] * values[i]
        b += values[i + 1] * values[i + 1]
        c += values[i + 2] * values[i + 2]
        d += values[i + 3] * values[i + 3]
    return (a + b) + (c + d)


@inline
def _rowwise_adagrad(weights, gradient, dim, total, rate, eps):
    total[0] += _sum_of_squares(gradient, dim) / np.float32(dim)
    factor = rate / (math.sqrt(total[0]) + eps)
    for i in range(dim):
        weights[i] -= factor * gradient[i]


@inline
def _adam(weights, gradient, dim, mean, square, numbers, corrections):
    rate, eps = np.float32(numbers[_LR]), np.float32(numbers[_EPS])
    beta1, beta2 = np.float32(numbers[_BETA1]), np.float32(numbers[_BETA2])
    new1, new2 = np.float32(1.0 - numbers[_BETA1]), np.float32(1.0 - numbers[_BETA2])
    correction1, correction2 = corrections[0], corrections[1]
    for i in range(dim):
        mean[i] = beta1 * mean[i] + new1 * gradient[i]
        square[i] = beta2 * square[i] + new2 * gradient[i] * gradient[i]
        weights[i] -= rate * (mean[i] / correction1 / (math.sqrt(square[i] / correction2) + eps))


@inline
def _decay(mode, weights, gradient, dim, numbers):
    decay = np.float32(numbers[_DECAY])
    if mode == _L2:
        for i in range(dim):
            gradient[i] += decay * weights[i]
    elif mode == _DECOUPLE:
        factor = np.float32(1) - np.float32(numbers[_LR]) * decay
        for i in range(dim):
            weights[i] *= factor


@inline
def _apply(kind, weights, gradient, dim, state, numbers, corrections):
    rate, eps = np.float32(numbers[_LR]), np.float32(numbers[_EPS])
    if kind == _SGD:
        _sgd(weights, gradient, dim, rate)
    elif kind == _ADAGRAD:
        _adagrad(weights, gradient, dim, as_float32(state), rate, eps)
    elif kind == _ROWWISE_ADAGRAD:
        _rowwise_adagrad(weights, gradient, dim, as_float32(state), rate, eps)
    else:
        _adam(weights, gradient, dim, as_float32(state), as_float32(state + dim * 4), numbers, corrections)


@kernel
def _update(
    start, stop, addresses, row_bytes, dim, code, state_offset, kind, decay_mode, tables, slots, order, offsets,
    gradients, gradient_bytes, gradient_code, hyperparameters, corrections,
):  # fmt: skip
    gradient, row, block = stack_bytes(MAX_ROW_BYTES), stack_bytes(MAX_ROW_BYTES), stack_bytes(MAX_ROW_BYTES)
    distance = rows_ahead(row_bytes)
    for u in range(start, stop):
        ahead = min(u + distance, stop - 1)
        if slots[ahead] >= 0:
            ahead_address = addresses[_ROWS, chunk_of(slots[ahead])] + offset_of(slots[ahead]) * row_bytes
            prefetch_to_write(ahead_address, row_bytes)
        slot = slots[u]
        if slot < 0:
            continue
        sum_rows(gradients, gradient_bytes, gradient_code, order, offsets[u], offsets[u + 1], gradient, block, dim)
        address = addresses[_ROWS, chunk_of(slot)] + offset_of(slot) * row_bytes
        weights = address
        if code != FLOAT32:
            weights = row
            read_row(address, code, row, dim)
        table = tables[u]
        _decay(decay_mode, as_float32(weights), as_float32(gradient), dim, hyperparameters[table])
        _apply(
            kind, as_float32(weights), as_float32(gradient), dim, address + state_offset, hyperparameters[table],
            corrections[table],
        )  # fmt: skip
        if code != FLOAT32:
            write_row(address, code, row, dim)


def update(
    view: GroupView,
    unique: UniqueKeys,
    slots: torch.Tensor,
    gradients: torch.Tensor,
    hyperparameters: torch.Tensor,
    steps: torch.Tensor,
    weight_decay_mode: WeightDecayMode,
    takes_step: Optional[torch.Tensor],
) -> None:
    layout = view.layout
    corrections = np.empty((steps.numel() if layout.optimizer is OptimizerKind.ADAM else 0, 2), np.float32)
    numbers = hyperparameters.numpy()
    advance_steps(steps.numpy(), _ALL_TABLES if takes_step is None else takes_step.numpy(), numbers, corrections)
    parallel_for(
        _update, slots.numel(), view.addresses.numpy(), np.int64(layout.row_bytes), np.int64(layout.dim),
        DTYPE_CODES[layout.embedding_dtype], np.int64(layout.state_offset_bytes), np.int64(layout.optimizer),
        np.int64(weight_decay_mode), unique.tables.numpy(), slots.numpy(), unique.order.numpy(), unique.offsets.numpy(),
        np.int64(gradients.data_ptr()), np.int64(layout.dim * gradients.itemsize),
        DTYPE_CODES[gradients.dtype], numbers, corrections,
    )  # fmt: skip
