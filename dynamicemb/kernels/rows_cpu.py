"""Rows of float32, float16 and bfloat16 in CPU kernels: read to float32, computed, rounded to nearest even on return.

The conversions are integer arithmetic, so they do not depend on what the processor supports.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from dynamicemb.kernels.numba_support import as_float32, as_uint16, copy_bytes, inline, prefetch, rows_ahead
from dynamicemb.kernels.segment_sum import BLOCK_ROWS
from dynamicemb.options import MAX_DIM

__all__ = ["DTYPE_CODES", "FLOAT32", "MAX_ROW_BYTES", "read_row", "sum_rows", "write_row"]

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
#: How kernels are told a dtype.
DTYPE_CODES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}

#: The widest row, in float32.
MAX_ROW_BYTES = 4 * MAX_DIM
_16 = np.uint32(16)
_BLOCK_ROWS = np.int64(BLOCK_ROWS)


@intrinsic
def _float_bits(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def _bits_float(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@inline
def _bfloat16_to_float(bits):
    return _bits_float(np.uint32(bits) << _16)


@inline
def _float_to_bfloat16(value):
    bits = _float_bits(value)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> _16) & np.uint32(1))) >> _16)


@inline
def _float16_to_float(half):
    bits = np.uint32(half)
    sign = (bits & np.uint32(0x8000)) << _16
    magnitude = bits & np.uint32(0x7FFF)
    if magnitude >= np.uint32(0x7C00):  # infinity and NaN
        return _bits_float(sign | np.uint32(0x7F800000) | ((magnitude & np.uint32(0x3FF)) << np.uint32(13)))
    # Exponent and fraction moved into place, then rebiased by an exact product; this covers subnormals too.
    value = _bits_float(magnitude << np.uint32(13)) * np.float32(5.192296858534828e33)  # 2**112
    return _bits_float(_float_bits(value) | sign)


@inline
def _float_to_float16(value):
    bits = _float_bits(value)
    sign = np.uint16((bits >> _16) & np.uint32(0x8000))
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint16(0x7E00))
    if magnitude >= np.uint32(0x477FF000):  # rounds to 65536 or beyond
        return np.uint16(sign | np.uint16(0x7C00))
    if magnitude < np.uint32(0x38800000):  # below 2**-14: adding 0.5 aligns the fraction with float16's subnormals
        aligned = _float_bits(_bits_float(magnitude) + np.float32(0.5))
        return np.uint16(sign | np.uint16(aligned - np.uint32(0x3F000000)))
    rounded = magnitude + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
    return np.uint16(sign | np.uint16((rounded - np.uint32(0x38000000)) >> np.uint32(13)))


@inline
def read_row(source, code, target, dim):
    """The row at address ``source`` to ``dim`` float32 values at address ``target``."""
    if code == FLOAT32:
        copy_bytes(target, source, dim * 4)
        return
    halves, values = as_uint16(source), as_float32(target)
    if code == FLOAT16:
        for i in range(dim):
            values[i] = _float16_to_float(halves[i])
    else:
        for i in range(dim):
            values[i] = _bfloat16_to_float(halves[i])


@inline
def write_row(target, code, source, dim):
    """``dim`` float32 values at address ``source`` to the row at address ``target``, rounded."""
    if code == FLOAT32:
        copy_bytes(target, source, dim * 4)
        return
    halves, values = as_uint16(target), as_float32(source)
    if code == FLOAT16:
        for i in range(dim):
            halves[i] = _float_to_float16(values[i])
    else:
        for i in range(dim):
            halves[i] = _float_to_bfloat16(values[i])


@inline
def add_row(source, code, target, dim):
    """Adds the row at address ``source`` to ``dim`` float32 values at address ``target``."""
    sums = as_float32(target)
    if code == FLOAT32:
        values = as_float32(source)
        for i in range(dim):
            sums[i] += values[i]
        return
    halves = as_uint16(source)
    if code == FLOAT16:
        for i in range(dim):
            sums[i] += _float16_to_float(halves[i])
    else:
        for i in range(dim):
            sums[i] += _bfloat16_to_float(halves[i])


@inline
def _set_to_zero(target, dim):
    values = as_float32(target)
    for i in range(dim):
        values[i] = np.float32(0)


@inline
def _add_rows(rows, row_bytes, code, order, first, last, target, dim):
    """Adds rows ``order[first:last]`` to those values, and asks for those that come after them in ``order``."""
    distance, used_bytes = rows_ahead(row_bytes), dim * 4 if code == FLOAT32 else dim * 2
    for i in range(first, last):
        prefetch(rows + order[min(i + distance, order.size - 1)] * row_bytes, used_bytes)
        add_row(rows + order[i] * row_bytes, code, target, dim)


@inline
def sum_rows(rows, row_bytes, code, order, first, last, target, block, dim):
    """Sums rows ``order[first:last]`` of those at address ``rows`` at address ``target``, in blocks as
    :mod:`~dynamicemb.kernels.segment_sum` says. ``block`` is the address of another row, for the sum of a block."""
    _set_to_zero(target, dim)
    while last - first >= _BLOCK_ROWS:
        _set_to_zero(block, dim)
        _add_rows(rows, row_bytes, code, order, first, first + _BLOCK_ROWS, block, dim)
        add_row(block, FLOAT32, target, dim)
        first += _BLOCK_ROWS
    _add_rows(rows, row_bytes, code, order, first, last, target, dim)
