"""Optimizer steps on the CPU: sum the gradients of a key in batch order, then change its row once."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import carray

from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.numba_support import as_float32, inline, kernel, numpy_view, parallel_for
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, FLOAT32, add_row, read_row, write_row
from dynamicemb.kernels.update import HyperparameterColumn
from dynamicemb.kernels.views import AddressRow, GroupView, UniqueKeys

_ROWS = np.int64(AddressRow.ROWS)
_LR, _EPS = np.int64(HyperparameterColumn.LEARNING_RATE), np.int64(HyperparameterColumn.EPS)
_BETA1, _BETA2 = np.int64(HyperparameterColumn.BETA1), np.int64(HyperparameterColumn.BETA2)
_DECAY = np.int64(HyperparameterColumn.WEIGHT_DECAY)
_SGD, _ADAGRAD = np.int64(OptimizerKind.SGD), np.int64(OptimizerKind.ADAGRAD)
_ROWWISE_ADAGRAD = np.int64(OptimizerKind.ROWWISE_ADAGRAD)


@inline
def _sgd(weights, gradient, rate):
    for i in range(weights.size):
        weights[i] -= rate * gradient[i]


@inline
def _adagrad(weights, gradient, total, rate, eps):
    for i in range(weights.size):
        total[i] += gradient[i] * gradient[i]
        weights[i] -= rate * gradient[i] / (math.sqrt(total[i]) + eps)


@inline
def _rowwise_adagrad(weights, gradient, total, rate, eps):
    squares = np.float32(0)
    for i in range(weights.size):
        squares += gradient[i] * gradient[i]
    total[0] += squares / np.float32(weights.size)
    factor = rate / (math.sqrt(total[0]) + eps)
    for i in range(weights.size):
        weights[i] -= factor * gradient[i]


@inline
def _adam(weights, gradient, mean, square, numbers, step):
    rate, eps, decay = np.float32(numbers[_LR]), np.float32(numbers[_EPS]), np.float32(numbers[_DECAY])
    beta1, beta2 = np.float32(numbers[_BETA1]), np.float32(numbers[_BETA2])
    new1, new2 = np.float32(1.0 - numbers[_BETA1]), np.float32(1.0 - numbers[_BETA2])
    correction1 = np.float32(1.0 - numbers[_BETA1] ** np.float64(step))
    correction2 = np.float32(1.0 - numbers[_BETA2] ** np.float64(step))
    for i in range(weights.size):
        mean[i] = beta1 * mean[i] + new1 * gradient[i]
        square[i] = beta2 * square[i] + new2 * gradient[i] * gradient[i]
        step_size = mean[i] / correction1 / (math.sqrt(square[i] / correction2) + eps)
        weights[i] -= rate * (step_size + decay * weights[i])


@kernel
def _update(
    start, stop, addresses, row_bytes, dim, code, state_offset, kind, tables, slots, order, offsets, gradients,
    gradient_code, hyperparameters, steps,
):  # fmt: skip
    gradient = np.empty(dim, np.float32)
    rounded = np.empty(dim, np.float32)
    for u in range(start, stop):
        slot = slots[u]
        if slot < 0:
            continue
        gradient[:] = np.float32(0)
        for i in range(offsets[u], offsets[u + 1]):
            add_row(gradients, order[i], gradient_code, gradient)
        address = addresses[_ROWS, chunk_of(slot)] + offset_of(slot) * row_bytes
        if code == FLOAT32:
            weights = carray(as_float32(address), (dim,))
        else:
            read_row(address, code, rounded)
            weights = rounded
        state = address + state_offset
        numbers = hyperparameters[tables[u]]
        rate, eps, decay = np.float32(numbers[_LR]), np.float32(numbers[_EPS]), np.float32(numbers[_DECAY])
        if kind <= _ROWWISE_ADAGRAD and decay != 0:
            for i in range(dim):
                gradient[i] += decay * weights[i]
        if kind == _SGD:
            _sgd(weights, gradient, rate)
        elif kind == _ADAGRAD:
            _adagrad(weights, gradient, carray(as_float32(state), (dim,)), rate, eps)
        elif kind == _ROWWISE_ADAGRAD:
            _rowwise_adagrad(weights, gradient, carray(as_float32(state), (1,)), rate, eps)
        else:
            mean, square = carray(as_float32(state), (dim,)), carray(as_float32(state + dim * 4), (dim,))
            _adam(weights, gradient, mean, square, numbers, steps[tables[u]])
        if code != FLOAT32:
            write_row(address, code, rounded)


def update(
    view: GroupView,
    unique: UniqueKeys,
    slots: torch.Tensor,
    gradients: torch.Tensor,
    hyperparameters: torch.Tensor,
    steps: torch.Tensor,
) -> None:
    layout = view.layout
    parallel_for(
        _update, slots.numel(), view.addresses.numpy(), np.int64(layout.row_bytes), layout.dim,
        DTYPE_CODES[layout.embedding_dtype], np.int64(layout.state_offset_bytes), np.int64(layout.optimizer),
        unique.tables.numpy(), slots.numpy(), unique.order.numpy(), unique.offsets.numpy(), numpy_view(gradients),
        DTYPE_CODES[gradients.dtype], hyperparameters.numpy(), steps.numpy(),
    )  # fmt: skip
