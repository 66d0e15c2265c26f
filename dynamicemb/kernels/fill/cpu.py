"""First values on the CPU: Philox, and distributions from correctly rounded float64 operations only."""

from __future__ import annotations

import math

import numpy as np
import torch

from dynamicemb.kernels.fill import (
    DEBUG_MODULUS,
    LN_2,
    LOG_TERMS,
    QUANTILE_CENTRE_A,
    QUANTILE_CENTRE_B,
    QUANTILE_TAIL,
    QUANTILE_TAIL_C,
    QUANTILE_TAIL_D,
    SQRT_HALF,
    FillMode,
)
from dynamicemb.kernels.hashing.cpu import chunk_of, offset_of
from dynamicemb.kernels.numba_support import as_float32, inline, kernel, parallel_for
from dynamicemb.kernels.rows_cpu import DTYPE_CODES, FLOAT32, read_row, write_row
from dynamicemb.kernels.views import AddressRow, GroupView, InitializerView, KeyStatus, UniqueKeys

_ROWS = np.int64(AddressRow.ROWS)
_INSERTED, _REPLACED = np.int8(KeyStatus.INSERTED), np.int8(KeyStatus.REPLACED)
_CONSTANT, _UNIFORM, _NORMAL = np.int32(FillMode.CONSTANT), np.int32(FillMode.UNIFORM), np.int32(FillMode.NORMAL)
_TRUNCATED_NORMAL = np.int32(FillMode.TRUNCATED_NORMAL)
_LOW_32, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
# Philox4x32: Salmon et al. 2011, table 2 and section 4.3.
_PHILOX_A, _PHILOX_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_A, _WEYL_B = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_CENTRE_A, _CENTRE_B = np.array(QUANTILE_CENTRE_A), np.array(QUANTILE_CENTRE_B)
_TAIL_C, _TAIL_D = np.array(QUANTILE_TAIL_C), np.array(QUANTILE_TAIL_D)


@inline
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; all values are 32-bit words in uint64."""
    for _ in range(10):
        product_a = c0 * _PHILOX_A
        product_b = c2 * _PHILOX_B
        c0 = (product_b >> _32) ^ c1 ^ k0
        c1 = product_b & _LOW_32
        c2 = (product_a >> _32) ^ c3 ^ k1
        c3 = product_a & _LOW_32
        k0 = (k0 + _WEYL_A) & _LOW_32
        k1 = (k1 + _WEYL_B) & _LOW_32
    return c0, c1, c2, c3


@inline
def _logarithm(p):
    fraction, exponent = math.frexp(p)
    if fraction < SQRT_HALF:
        fraction = fraction * 2.0
        exponent -= 1
    s = (fraction - 1.0) / (fraction + 1.0)
    square = s * s
    series = 1.0 / (2 * LOG_TERMS - 1)
    for term in range(LOG_TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * term - 1)
    return exponent * LN_2 + 2.0 * (s * series)


@inline
def _horner(coefficients, x):
    value = coefficients[0]
    for i in range(1, coefficients.size):
        value = value * x + coefficients[i]
    return value


@inline
def _tail_quantile(p):
    q = math.sqrt(-2.0 * _logarithm(p))
    return _horner(_TAIL_C, q) / (_horner(_TAIL_D, q) * q + 1.0)


@inline
def quantile(p):
    """Quantile of the standard normal distribution."""
    if p < QUANTILE_TAIL:
        return _tail_quantile(p)
    if p > 1.0 - QUANTILE_TAIL:
        return -_tail_quantile(1.0 - p)
    q = p - 0.5
    r = q * q
    return _horner(_CENTRE_A, r) * q / (_horner(_CENTRE_B, r) * r + 1.0)


@inline
def _value(word, mode, parameters):
    u = (np.float64(word) + 0.5) * 2.3283064365386963e-10  # 2**-32
    if mode == _UNIFORM:
        return np.float32(parameters[0] + (parameters[1] - parameters[0]) * u)
    if mode == _NORMAL:
        return np.float32(parameters[0] + parameters[1] * quantile(u))
    return np.float32(parameters[0] + parameters[1] * quantile(parameters[2] + (parameters[3] - parameters[2]) * u))


@inline
def first_values(key, seed, mode, parameters, out):
    """out[:] = the row that ``key`` begins with, in float32; ``out.size`` is a multiple of 4."""
    if mode == _CONSTANT:
        out[:] = np.float32(parameters[0])
        return
    if mode > _TRUNCATED_NORMAL:  # DEBUG
        out[:] = np.float32(key % DEBUG_MODULUS)
        return
    bits, seed_bits = np.uint64(key), np.uint64(seed)
    for block in range(out.size // 4):
        words = philox(
            bits & _LOW_32, bits >> _32, np.uint64(block), np.uint64(0), seed_bits & _LOW_32, seed_bits >> _32
        )
        for i in range(4):
            out[4 * block + i] = _value(words[i], mode, parameters)


@kernel
def _fill(
    start, stop, addresses, row_bytes, dim, code, state_offset, state_width, keys, tables, slots, status, seeds, modes,
    parameters, states,
):  # fmt: skip
    row = np.empty(dim, np.float32)
    row_address = np.int64(row.ctypes.data)
    for u in range(start, stop):
        if status[u] != _INSERTED and status[u] != _REPLACED:
            continue
        table = tables[u]
        address = addresses[_ROWS, chunk_of(slots[u])] + offset_of(slots[u]) * row_bytes
        first_values(keys[u], seeds[table], modes[table], parameters[table], row)
        write_row(address, code, row_address, dim)
        state = as_float32(address + state_offset)
        for i in range(state_width):
            state[i] = states[table]


@kernel
def _fill_missing(start, stop, rows, keys, tables, slots, seeds, modes, parameters, code):
    dim = rows.shape[1]
    rounded = np.empty(dim, np.float32)  # room enough for any dtype
    rounded_address = np.int64(rounded.ctypes.data)
    for i in range(start, stop):
        if slots[i] >= 0:
            continue
        table = tables[i]
        first_values(keys[i], seeds[table], modes[table], parameters[table], rows[i])
        if code != FLOAT32:
            row_address = np.int64(rows.ctypes.data) + i * dim * 4
            write_row(rounded_address, code, row_address, dim)
            read_row(rounded_address, code, row_address, dim)


def fill(view: GroupView, unique: UniqueKeys, slots: torch.Tensor, status: torch.Tensor, init: InitializerView) -> None:
    layout = view.layout
    parallel_for(
        _fill, unique.keys.numel(), view.addresses.numpy(), np.int64(layout.row_bytes), layout.dim,
        DTYPE_CODES[layout.embedding_dtype], np.int64(layout.state_offset_bytes), layout.state_width,
        unique.keys.numpy(), unique.tables.numpy(), slots.numpy(), status.numpy(), init.seeds.numpy(),
        init.modes.numpy(), init.parameters.numpy(), init.states.numpy(),
    )  # fmt: skip


def fill_missing(
    rows: torch.Tensor, keys: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, init: InitializerView,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    parallel_for(
        _fill_missing, keys.numel(), rows.numpy(), keys.numpy(), tables.numpy(), slots.numpy(), init.seeds.numpy(),
        init.modes.numpy(), init.parameters.numpy(), DTYPE_CODES[dtype],
    )  # fmt: skip
