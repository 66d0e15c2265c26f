"""Digest lines on the CPU: the slots of a bucket that have a given digest, 64 of them in one comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dynamicemb.kernels.layout import NO_SLOT
from dynamicemb.kernels.numba_support import inline

__all__ = ["first_match"]

_NO_SLOT = np.int64(NO_SLOT)
_0 = np.uint64(0)


def _bytes_equal_to(count: int) -> Any:
    """(address of ``count`` bytes, byte) -> uint64 whose bit ``i`` says whether byte ``i`` is that byte. LLVM makes
    it one or a few instructions of whatever vectors the processor has."""

    @intrinsic
    def bytes_equal(typing_context, address, byte):
        signature = types.uint64(types.int64, types.uint8)

        def generate(context, builder, signature, arguments):
            vector = ir.VectorType(ir.IntType(8), count)
            line = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()), align=1)
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[1], ir.IntType(32)(0))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
            equal = builder.icmp_unsigned("==", line, builder.shuffle_vector(one, one, lanes))
            bits = builder.bitcast(equal, ir.IntType(count))
            return bits if count == 64 else builder.zext(bits, ir.IntType(64))

        return signature, generate

    return bytes_equal


_equal_of_8, _equal_of_64 = _bytes_equal_to(8), _bytes_equal_to(64)


@intrinsic
def _trailing_zeros(typing_context, bits):
    """Of a uint64 that is not 0."""
    signature = types.int64(types.uint64)

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return signature, generate


@inline
def first_match(digests, digest, slot, capacity):
    """First slot from ``slot`` on whose digest is ``digest``, or −1; ``digests`` is the address of a bucket's line."""
    while slot < capacity:
        if capacity >= 64:
            width, equal = np.int64(64), _equal_of_64(digests + (slot & ~63), digest)
        else:
            width, equal = np.int64(8), _equal_of_8(digests + (slot & ~7), digest)
        equal >>= np.uint64(slot & (width - 1))  # without the slots before this one
        if equal != _0:
            return slot + _trailing_zeros(equal)
        slot = (slot | (width - 1)) + 1
    return _NO_SLOT
