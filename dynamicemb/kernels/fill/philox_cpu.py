"""Philox4x32-10 on the CPU (Salmon et al. 2011, table 2 and section 4.3), several counters in the lanes of a vector."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["BLOCKS", "philox_blocks"]

#: Blocks of four words that are computed together: as many 64-bit lanes as the widest vectors have. Narrower ones take
#: several instructions for each, which do not wait for each other.
BLOCKS = 8
_ROUNDS = 10
_FACTORS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85

_LANE, _INDEX = ir.IntType(64), ir.IntType(32)
_LANES = ir.VectorType(_LANE, BLOCKS)


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_LANES, [value] * BLOCKS)


_LOW_32, _32 = _constant(0xFFFFFFFF), _constant(32)


def _indexes(*lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INDEX, len(lanes)), list(lanes))


def _in_all_lanes(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, _INDEX(0))
    return builder.shuffle_vector(first, first, _indexes(*[0] * BLOCKS))


def _halves(builder: Any, value: Any) -> tuple[Any, Any]:
    """(low, high) 32 bits of each lane."""
    return builder.and_(value, _LOW_32), builder.lshr(value, _32)


@intrinsic
def philox_blocks(typing_context, key, seed, first_block, words):  # type: ignore[no-untyped-def]
    """Stores the words of :data:`BLOCKS` blocks from ``first_block`` on, in their order, at address ``words``: the
    counters ``(key low, key high, block, 0)`` under the Philox key ``seed``, all of them uint64."""
    signature = types.void(types.uint64, types.uint64, types.uint64, types.int64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        key, seed, first = (_in_all_lanes(builder, argument) for argument in arguments[:3])
        (c0, c1), (k0, k1) = _halves(builder, key), _halves(builder, seed)
        c2, c3 = builder.add(first, ir.Constant(_LANES, list(range(BLOCKS)))), _constant(0)
        for _ in range(_ROUNDS):
            (low_a, high_a), (low_b, high_b) = (
                _halves(builder, builder.mul(counter, _constant(factor)))
                for counter, factor in zip((c0, c2), _FACTORS, strict=True)
            )
            c0, c1 = builder.xor(builder.xor(high_b, c1), k0), low_b
            c2, c3 = builder.xor(builder.xor(high_a, c3), k1), low_a
            k0, k1 = (
                builder.and_(builder.add(word, _constant(step)), _LOW_32)
                for word, step in zip((k0, k1), _WEYL, strict=True)
            )
        first_two, last_two = (builder.or_(low, builder.shl(high, _32)) for low, high in ((c0, c1), (c2, c3)))
        in_order = _indexes(*(half * BLOCKS + lane for lane in range(BLOCKS) for half in (0, 1)))
        vector = builder.shuffle_vector(first_two, last_two, in_order)
        builder.store(vector, builder.inttoptr(arguments[3], vector.type.as_pointer()), align=64)
        return context.get_dummy_value()

    return signature, generate
