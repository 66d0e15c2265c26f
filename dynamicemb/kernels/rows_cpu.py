"""Rows of float32, float16 and bfloat16 in CPU kernels: read to float32, computed, rounded to nearest even on return.

The conversions are integer arithmetic, so they do not depend on what the processor supports.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from dynamicemb.kernels.numba_support import as_float32, as_uint16, inline

__all__ = ["DTYPE_CODES", "add_row", "read_row", "write_row"]

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
#: How kernels are told a dtype.
DTYPE_CODES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}

_16 = np.uint32(16)


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
def read_row(address, code, out):
    """out[:] = the row of ``out.size`` values at ``address``."""
    if code == FLOAT32:
        out[:] = carray(as_float32(address), (out.size,))
    elif code == FLOAT16:
        halves = carray(as_uint16(address), (out.size,))
        for i in range(out.size):
            out[i] = _float16_to_float(halves[i])
    else:
        halves = carray(as_uint16(address), (out.size,))
        for i in range(out.size):
            out[i] = _bfloat16_to_float(halves[i])


@inline
def write_row(address, code, values):
    """The row at ``address`` = ``values``, rounded."""
    if code == FLOAT32:
        row = carray(as_float32(address), (values.size,))
        row[:] = values
    elif code == FLOAT16:
        halves = carray(as_uint16(address), (values.size,))
        for i in range(values.size):
            halves[i] = _float_to_float16(values[i])
    else:
        halves = carray(as_uint16(address), (values.size,))
        for i in range(values.size):
            halves[i] = _float_to_bfloat16(values[i])


def add_row(values, index, code, out):
    """out += values[index]; ``values`` is float32, or uint16 with a float16 or bfloat16 pattern. Replaced below."""
    raise AssertionError("only compiled code calls this")


from numba.extending import overload  # noqa: E402


@overload(add_row, inline="never")
def _add_row(values, index, code, out):
    if values.dtype == types.float32:

        def add_float32(values, index, code, out):
            for i in range(out.size):
                out[i] += values[index, i]

        return add_float32

    def add_half(values, index, code, out):
        for i in range(out.size):
            bits = values[index, i]
            out[i] += _float16_to_float(bits) if code == FLOAT16 else _bfloat16_to_float(bits)

    return add_half
