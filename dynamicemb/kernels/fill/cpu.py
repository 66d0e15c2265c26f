"""First values on the CPU: Philox, and distributions from correctly rounded float64 operations only."""

from __future__ import annotations

import math

import numpy as np
import torch

from dynamicemb.kernels.fill import (
    DEBUG_MODULUS,
    LEAST_NORMAL,
    LN_2,
    LOG_TERMS,
    QUANTILE_CENTRE_A,
    QUANTILE_CENTRE_B,
    QUANTILE_TAIL,
    QUANTILE_TAIL_C,
    QUANTILE_TAIL_D,
    SQRT_HALF,
    TWO_TO_54,
    FillMode,
)
from dynamicemb.kernels.fill.philox_cpu import BLOCKS, philox_blocks
from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.numba_support import (
    always_inline,
    as_float32,
    as_uint32,
    inline,
    kernel,
    parallel_for,
    prefetch_to_write,
    rows_ahead,
    stack_bytes,
)
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, FLOAT32, MAX_ROW_BYTES, read_row, write_row
from dynamicemb.kernels.views import AddressRow, GroupView, InitializerView, KeyStatus, UniqueKeys

_ROWS = np.int64(AddressRow.ROWS)
_INSERTED, _REPLACED = np.int8(KeyStatus.INSERTED), np.int8(KeyStatus.REPLACED)
_CONSTANT, _UNIFORM, _NORMAL = np.int32(FillMode.CONSTANT), np.int32(FillMode.UNIFORM), np.int32(FillMode.NORMAL)
_TRUNCATED_NORMAL = np.int32(FillMode.TRUNCATED_NORMAL)
_WORDS = 4 * BLOCKS
#: Scratch memory of :func:`first_values`.
WORDS_BYTES = 4 * _WORDS


@always_inline
def _logarithm(p):
    """Natural logarithm of ``p`` in [0, 1]. Without a branch or a call (``frexp`` is one), and so for all lanes of a
    vector at once."""
    subnormal = p < LEAST_NORMAL
    bits = np.float64(p * TWO_TO_54 if subnormal else p).view(np.int64)
    exponent = (bits >> 52) - (1022 + 54 if subnormal else 1022)
    fraction = np.int64((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).view(np.float64)  # from 0.5 to below 1
    if p == 0.0:
        exponent, fraction = np.int64(0), np.float64(0.0)
    if fraction < SQRT_HALF:
        exponent, fraction = exponent - 1, fraction * 2.0
    s = (fraction - 1.0) / (fraction + 1.0)
    square = s * s
    series = 1.0 / (2 * LOG_TERMS - 1)
    for term in range(LOG_TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * term - 1)
    return exponent * LN_2 + 2.0 * (s * series)


@always_inline
def _horner(coefficients, x):
    """``coefficients`` is a tuple: an array would be read from memory, number by number."""
    value = coefficients[0]
    for i in range(1, len(coefficients)):
        value = value * x + coefficients[i]
    return value


@always_inline
def quantile(p):
    """Quantile of the standard normal distribution; all of its parts, of which one is taken, without a branch."""
    upper = p > 1.0 - QUANTILE_TAIL
    q = math.sqrt(-2.0 * _logarithm(1.0 - p if upper else p))
    tail = _horner(QUANTILE_TAIL_C, q) / (_horner(QUANTILE_TAIL_D, q) * q + 1.0)
    centred = p - 0.5
    r = centred * centred
    centre = _horner(QUANTILE_CENTRE_A, r) * centred / (_horner(QUANTILE_CENTRE_B, r) * r + 1.0)
    return tail if p < QUANTILE_TAIL else -tail if upper else centre


@always_inline
def _probability(word):
    return (np.float64(word) + 0.5) * 2.3283064365386963e-10  # 2**-32


@inline
def first_values(key, seed, mode, parameters, out, dim, words):
    """Writes the row that ``key`` begins with to ``dim`` float32 values at address ``out``; ``dim`` is a multiple of 4.
    ``words`` is the address of WORDS_BYTES bytes of scratch memory."""
    values, words_here = as_float32(out), as_uint32(words)
    if mode == _CONSTANT or mode > _TRUNCATED_NORMAL:  # DEBUG
        value = np.float32(parameters[0]) if mode == _CONSTANT else np.float32(key % DEBUG_MODULUS)
        for i in range(dim):
            values[i] = value
        return
    p0, p1, p2, p3 = parameters[0], parameters[1], parameters[2], parameters[3]
    for first in range(0, dim, _WORDS):
        philox_blocks(np.uint64(key), np.uint64(seed), np.uint64(first // 4), words)
        count = min(dim - first, _WORDS)
        if mode == _UNIFORM:
            for i in range(count):
                values[first + i] = np.float32(p0 + (p1 - p0) * _probability(words_here[i]))
        else:
            lowest, width = (0.0, 1.0) if mode == _NORMAL else (p2, p3 - p2)
            for i in range(count):
                p = lowest + width * _probability(words_here[i])
                values[first + i] = np.float32(p0 + p1 * quantile(p))


@kernel
def _fill(
    start, stop, addresses, row_bytes, dim, code, state_offset, state_width, keys, tables, slots, status, seeds, modes,
    parameters, states,
):  # fmt: skip
    words, rounded_from = stack_bytes(WORDS_BYTES), stack_bytes(MAX_ROW_BYTES)
    distance = rows_ahead(row_bytes)
    for u in range(start, stop):
        ahead = min(u + distance, stop - 1)
        if status[ahead] == _INSERTED or status[ahead] == _REPLACED:
            row = addresses[_ROWS, chunk_of(slots[ahead])] + offset_of(slots[ahead]) * row_bytes
            prefetch_to_write(row, row_bytes)
        if status[u] != _INSERTED and status[u] != _REPLACED:
            continue
        table = tables[u]
        address = addresses[_ROWS, chunk_of(slots[u])] + offset_of(slots[u]) * row_bytes
        values = address if code == FLOAT32 else rounded_from
        first_values(keys[u], seeds[table], modes[table], parameters[table], values, dim, words)
        if code != FLOAT32:
            write_row(address, code, values, dim)
        state = as_float32(address + state_offset)
        for i in range(state_width):
            state[i] = states[table]


@kernel
def _fill_missing(start, stop, rows, dim, keys, tables, slots, seeds, modes, parameters, code):
    words, rounded = stack_bytes(WORDS_BYTES), stack_bytes(MAX_ROW_BYTES)
    for i in range(start, stop):
        if slots[i] >= 0:
            continue
        table, row = tables[i], rows + i * dim * 4
        first_values(keys[i], seeds[table], modes[table], parameters[table], row, dim, words)
        if code != FLOAT32:
            write_row(rounded, code, row, dim)
            read_row(rounded, code, row, dim)


def fill(view: GroupView, unique: UniqueKeys, slots: torch.Tensor, status: torch.Tensor, init: InitializerView) -> None:
    layout = view.layout
    parallel_for(
        _fill, unique.keys.numel(), view.addresses.numpy(), np.int64(layout.row_bytes), np.int64(layout.dim),
        DTYPE_CODES[layout.embedding_dtype], np.int64(layout.state_offset_bytes), layout.state_width,
        unique.keys.numpy(), unique.tables.numpy(), slots.numpy(), status.numpy(), init.seeds.numpy(),
        init.modes.numpy(), init.parameters.numpy(), init.states.numpy(),
    )  # fmt: skip


def fill_missing(
    rows: torch.Tensor, keys: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, init: InitializerView,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    parallel_for(
        _fill_missing, keys.numel(), np.int64(rows.data_ptr()), np.int64(rows.shape[1]), keys.numpy(), tables.numpy(),
        slots.numpy(), init.seeds.numpy(), init.modes.numpy(), init.parameters.numpy(), DTYPE_CODES[dtype],
    )  # fmt: skip
