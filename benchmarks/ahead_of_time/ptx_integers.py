"""Integer operations of PTX on the registers of many threads: arrays of uint64, of which the low bits count."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

__all__ = ["compared", "extended", "integer_result", "is_integer", "low_bits", "type_bits"]

_U64 = np.uint64
_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_BITWISE: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "not": np.invert, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def is_integer(type_name: str) -> bool:
    return re.fullmatch(r"[sub]\d+|pred", type_name) is not None


def type_bits(type_name: str) -> int:
    """Of ``s32``, ``pred``, ``f32x2`` and the like."""
    if type_name == "pred":
        return 1
    bits, *count = (int(number) for number in re.findall(r"\d+", type_name))
    return bits * (count[0] if count else 1)


def low_bits(x: np.ndarray, bits: int) -> np.ndarray:
    return x if bits == 64 else x & _U64((1 << bits) - 1)


def extended(x: np.ndarray, type_name: str) -> np.ndarray:
    """The numbers themselves: int64 if the type is signed, else uint64."""
    unused = 64 - type_bits(type_name)
    return (x << _U64(unused)).view(np.int64) >> unused if type_name[0] == "s" else low_bits(x, 64 - unused)


def compared(comparison: str, type_name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``setp``: 0 or 1 for each thread."""
    return _COMPARISONS[comparison](extended(a, type_name), extended(b, type_name)).astype(_U64)


def integer_result(opcode: tuple[str, ...], operands: list[np.ndarray]) -> np.ndarray | None:
    """What an operation gives, in as many low bits as its result has; None if it is none of those known here."""
    operation, type_name = opcode[0], opcode[-1]
    if operation == "cvt":
        exact = len(opcode) == 3 and is_integer(opcode[1]) and is_integer(type_name)
        return extended(operands[0], type_name).view(_U64) if exact else None
    if not is_integer(type_name):
        return None
    if operation in _BITWISE:
        return _BITWISE[operation](*operands)
    if operation in ("min", "max"):
        numbers = [extended(operand, type_name) for operand in operands]
        return (np.minimum if operation == "min" else np.maximum)(*numbers).view(_U64)
    if operation in ("mul", "mad") and opcode[1] in ("lo", "wide"):
        a, b = (extended(operand, type_name).view(_U64) for operand in operands[:2])
        return a * b if operation == "mul" else a * b + operands[2]
    if operation in ("shl", "shr"):
        return _shifted(operation, type_name, *operands)
    if operation == "bfe":
        return _field(type_name, *operands)
    return None


def _shifted(operation: str, type_name: str, x: np.ndarray, by: np.ndarray) -> np.ndarray:
    x, by = extended(x, type_name), low_bits(by, 32)
    inside = by < type_bits(type_name)  # further than that, zeros or copies of the sign are left
    by = np.minimum(by, _U64(63))
    if operation == "shl":
        return np.where(inside, x.view(_U64) << by, _U64(0))
    if type_name[0] == "s":
        return (x >> by.astype(np.int64)).view(_U64)
    return np.where(inside, x >> by, _U64(0))


def _field(type_name: str, x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray | None:
    """``bfe`` of a field that is the same for all threads and lies inside the type."""
    begin, bits = int(position[0]), int(length[0])
    same = (position == begin).all() and (length == bits).all()
    if not same or not 0 < bits <= type_bits(type_name) - begin:
        return None
    return extended(x >> _U64(begin), f"{type_name[0]}{bits}").view(_U64)
