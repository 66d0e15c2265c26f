"""Random interpretation of PTX (Gulwani and Necula 2003): all threads of one program run it on random values.

What an argument, a word of global memory or a floating-point operation gives is a random number, but always the same
one for the same name, address or operands. Operations on integers, exchanges between threads and shared memory are
computed as a GPU computes them. So addresses that are equal in every run are equal in this one, as long as their values
come from the same operations on the same words of memory, and other addresses differ, but for a chance of 2**-64.

The caller decides which path is taken, and all threads take it. A predicate is *known* in a thread if it follows from
the number of the thread alone. Where it is not, a load is executed, and a store may be.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ahead_of_time.ptx import Instruction, Program, PtxError
from ahead_of_time.ptx_integers import compared, extended, integer_result, is_integer, low_bits, type_bits

__all__ = ["Access", "RandomInterpreter"]

_WARP = 32
_SHARED_BYTES = 228 * 1024
_U64 = np.uint64
_COMMUTATIVE = frozenset({"add", "and", "fma", "mad", "max", "min", "mul", "or", "xor"})
_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


class _Value(NamedTuple):
    """A register: its bits in each thread, and whether these follow from the thread's number."""

    bits: np.ndarray
    known: np.ndarray


@dataclass(frozen=True)
class Access:
    """One execution of an instruction that accesses global memory, with an entry for each thread.

    Attributes:
        instruction: that it is.
        addresses: uint64.
        may_run: bool, False where it is known that the thread does not run it.
        runs: bool, whether the thread runs it with these random values.
        num_bytes: that a thread accesses.
    """

    instruction: Instruction
    addresses: np.ndarray
    may_run: np.ndarray
    runs: np.ndarray
    num_bytes: int


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    x = x + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


class RandomInterpreter:
    """The threads of a program, after the instructions that :meth:`run` has been given so far."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._threads = np.arange(program.threads, dtype=_U64)
        self._warps = np.arange(program.threads) // _WARP
        self._constants: dict[str, _Value] = {}
        self._all = np.ones(program.threads, dtype=bool)
        self._none = np.zeros(program.threads, dtype=bool)
        self._registers: dict[str, _Value] = {}
        self._shared = np.zeros(_SHARED_BYTES, np.uint8)

    def run(self, instruction: Instruction) -> Access | None:
        """Runs an instruction. Returns its access to global memory; None for a store of what is there already."""
        opcode, operands = instruction.opcode, instruction.operands
        operation = opcode[0]
        guard = self._guard(instruction)
        if instruction.accesses_global_memory:
            return self._access_global(instruction, guard)
        if instruction.is_pure:
            self._set(operands[0], self._pure(instruction), guard)
        elif opcode[:2] == ("ld", "param"):
            self._set(operands[0], [self._argument(operands[1][0], type_bits(opcode[-1]))], guard)
        elif operation in ("ld", "st"):
            self._access_shared(instruction, self._may_run(guard))
        elif operation in ("ldmatrix", "stmatrix"):
            self._access_matrices(instruction)
        elif operation == "shfl":
            self._shuffle(instruction)
        elif operation == "redux":
            self._reduce(instruction)
        return None

    def _argument(self, name: str, bits: int) -> _Value:
        """A multiple of 16, as pointers are, and positive."""
        return _Value(low_bits(self._random(name, []), min(bits, 47) - 1) & ~_U64(15), self._none)

    def _random(self, name: str, operands: list[np.ndarray]) -> np.ndarray:
        number = np.full(self._program.threads, zlib.crc32(name.encode()), dtype=_U64)
        for operand in operands:
            number = _mixed(number ^ operand)
        return _mixed(number)

    # Registers

    def _get(self, name: str) -> _Value:
        if name in self._registers:
            return self._registers[name]
        if name == "%tid.x":
            return _Value(self._threads, self._all)
        if name in ("%ctaid.x", "%nctaid.x"):
            return _Value(low_bits(self._random(name, []), 20), self._none)
        if name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "global_smem"):
            return _Value(np.zeros_like(self._threads), self._all)
        if name.startswith("%"):
            self._program.bits_of(name)
            return _Value(self._random(name, []), self._none)  # undefined on this path
        if name not in self._constants:
            number = int(name[2:], 16) if name[:2] in ("0f", "0d") else int(name.rstrip("U"), 0)
            bits = np.full(self._program.threads, number & (2**64 - 1), dtype=_U64)
            self._constants[name] = _Value(bits, self._all)
        return self._constants[name]

    def _set(self, names: tuple[str, ...], values: list[_Value], guard: _Value | None) -> None:
        assert len(names) == len(values)
        for name, value in zip(names, values):
            if name == "_":
                continue
            value = _Value(low_bits(value.bits, self._program.bits_of(name)), value.known)
            if guard is not None:
                before, where = self._get(name), guard.bits != 0
                known = np.where(where, value.known, before.known) & guard.known
                value = _Value(np.where(where, value.bits, before.bits), known)
            self._registers[name] = value

    def _guard(self, instruction: Instruction) -> _Value | None:
        if instruction.guard is None:
            return None
        guard = self._get(instruction.guard)
        return _Value(guard.bits ^ _U64(1), guard.known) if instruction.negated else guard

    def _may_run(self, guard: _Value | None) -> np.ndarray:
        return self._all if guard is None else (guard.bits != 0) | ~guard.known

    def _known(self, operands: list[_Value]) -> np.ndarray:
        known = self._all
        for operand in operands:
            known = operand.known if known is self._all else known & operand.known
        return known

    # Operations

    def _pure(self, instruction: Instruction) -> list[_Value]:
        opcode, results = instruction.opcode, instruction.operands[0]
        operation, kind = opcode[0], opcode[-1]
        if operation == "mov":
            return self._move(instruction)
        if len(results) != 1 or any(len(operand) != 1 for operand in instruction.operands):
            raise PtxError(instruction.text)
        operands = [self._get(operand[0]) for operand in instruction.operands[1:]]
        bits = [operand.bits for operand in operands]
        known = self._known(operands)
        if operation == "selp":
            return [_Value(np.where(bits[2] != 0, bits[0], bits[1]), known)]
        if operation == "setp":
            return [self._compared(instruction, operands, known)]
        if (number := integer_result(opcode, bits)) is not None:
            if kind == "pred" and operation in ("and", "or"):
                decides = _U64(operation == "or")
                for operand in operands:
                    known = known | (operand.known & (operand.bits == decides))
            return [_Value(number, known)]
        if operation in _COMMUTATIVE:
            bits[:2] = [np.minimum(*bits[:2]), np.maximum(*bits[:2])]
        return [_Value(self._random(".".join(opcode), bits), self._none)]

    def _compared(self, instruction: Instruction, operands: list[_Value], known: np.ndarray) -> _Value:
        _, comparison, *more, kind = instruction.opcode
        if more and more != ["ftz"]:
            raise PtxError(instruction.text)
        bits = [operand.bits for operand in operands]
        if is_integer(kind):
            return _Value(compared(comparison, kind, *bits), known)
        return _Value(self._random(f"{comparison}.{kind}", bits) & _U64(1), self._none)

    def _move(self, instruction: Instruction) -> list[_Value]:
        """Also takes registers apart and puts them together."""
        results, sources = instruction.operands
        values = [self._get(source) for source in sources]
        if len(results) == len(sources):
            return values
        part = type_bits(instruction.opcode[-1]) // max(len(results), len(sources))
        if len(sources) == 1:
            ((bits, known),) = values
            return [_Value(low_bits(bits >> _U64(part * number), part), known) for number in range(len(results))]
        whole = np.zeros_like(self._threads)
        for number, value in enumerate(values):
            whole = whole | (low_bits(value.bits, part) << _U64(part * number))
        return [_Value(whole, self._known(values))]

    # Threads of a warp

    def _shuffle(self, instruction: Instruction) -> None:
        (result, *in_range), (source,), (by,), (limits,), _ = instruction.operands
        mode = instruction.opcode[2]
        values = self._get(source)
        lane = (self._threads % _U64(_WARP)).astype(np.int64)
        distance, bound = (self._get(name).bits.astype(np.int64) for name in (by, limits))
        segment, clamp = (bound >> 8) & 31, bound & 31
        first, last = lane & segment, (lane & segment) | (clamp & ~segment)
        other = {
            "up": lane - distance, "down": lane + distance, "bfly": lane ^ distance,
            "idx": first | (distance & ~segment & 31),
        }[mode]  # fmt: skip
        inside = other >= last if mode == "up" else other <= last
        thread = self._warps * _WARP + np.where(inside, other, lane)
        self._set((result,), [_Value(values.bits[thread], values.known[thread])], None)
        if in_range:
            self._set(tuple(in_range), [_Value(inside.astype(_U64), self._all)], None)

    def _reduce(self, instruction: Instruction) -> None:
        (result,), (source,), _ = instruction.operands
        kind = instruction.opcode[-1]
        by_warp = extended(self._get(source).bits, kind).reshape(-1, _WARP)
        reduced = _REDUCTIONS[instruction.opcode[2]].reduce(by_warp, axis=1).view(_U64)
        self._set((result,), [_Value(np.repeat(reduced, _WARP), self._none)], None)

    # Memory

    def _address(self, operand: tuple[str, ...]) -> np.ndarray:
        match = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand[0])
        if match is None:
            raise PtxError(f"address {operand[0]}")
        base, offset = match.groups()
        return self._get(base).bits + _U64(int(offset or "0", 0) & (2**64 - 1))

    def _widths(self, instruction: Instruction) -> tuple[int, int]:
        """Values that each thread moves, and bytes of each."""
        (count,) = [int(part[1:]) for part in instruction.opcode if re.fullmatch(r"v\d", part)] or [1]
        return count, type_bits(instruction.opcode[-1]) // 8

    def _access_global(self, instruction: Instruction, guard: _Value | None) -> Access | None:
        operation = instruction.opcode[0]
        count, num_bytes = self._widths(instruction)
        address = self._address(instruction.operands[0 if operation in ("st", "red") else 1])
        in_memory = [self._word(address + _U64(number * num_bytes), num_bytes) for number in range(count)]
        may_run = self._may_run(guard)
        if operation in ("ld", "atom"):
            values = [_Value(bits, self._none) for bits in self._as_loaded(instruction, in_memory)]
            self._set(instruction.operands[0], values, guard and _Value(may_run.astype(_U64), guard.known))
        elif operation == "st":
            stored = [low_bits(self._get(name).bits, 8 * num_bytes) for name in instruction.operands[1]]
            if all((new == old)[may_run].all() for new, old in zip(stored, in_memory)):
                return None
        runs = self._all if guard is None else guard.bits != 0
        return Access(instruction, address, may_run, runs, count * num_bytes)

    def _word(self, address: np.ndarray, num_bytes: int) -> np.ndarray:
        """What memory has there: words of 32 bits that are not negative."""
        words = [low_bits(self._random("memory", [(address >> _U64(2)) + _U64(number)]), 31) for number in range(2)]
        word = words[0] | (words[1] << _U64(32)) if num_bytes == 8 else words[0]
        return low_bits(word >> ((address & _U64(3)) << _U64(3)), 8 * num_bytes)

    def _as_loaded(self, instruction: Instruction, values: list[np.ndarray]) -> list[np.ndarray]:
        kind = instruction.opcode[-1]
        return [extended(value, kind).view(_U64) for value in values] if kind[0] == "s" else values

    def _access_shared(self, instruction: Instruction, may_run: np.ndarray) -> None:
        count, num_bytes = self._widths(instruction)
        is_load = instruction.opcode[0] == "ld"
        address = self._address(instruction.operands[1 if is_load else 0])
        places = np.where(may_run, address % _SHARED_BYTES, 0).astype(np.int64)[:, None] + np.arange(count * num_bytes)
        if not is_load:
            sources = [self._get(name).bits for name in instruction.operands[1]]
            values = np.stack(sources, axis=1).view(np.uint8).reshape(len(self._threads), count, 8)[:, :, :num_bytes]
            self._shared[places[may_run]] = values.reshape(len(self._threads), -1)[may_run]
            return
        padded = np.zeros((len(self._threads), count, 8), np.uint8)
        padded[:, :, :num_bytes] = self._shared[places].reshape(len(self._threads), count, num_bytes)
        loaded = [padded[:, number].copy().view(_U64)[:, 0] for number in range(count)]
        values = [_Value(bits, self._none) for bits in self._as_loaded(instruction, loaded)]
        self._set(instruction.operands[0], values, _Value(may_run.astype(_U64), self._all))

    def _access_matrices(self, instruction: Instruction) -> None:
        """``stmatrix`` and ``ldmatrix``: thread ``8 * m + r`` of a warp has the address of row ``r`` of matrix ``m``,
        which is 16 bytes; four neighbours have the row's values, four bytes each."""
        if "trans" in instruction.opcode or instruction.opcode[-1] != "b16":
            raise PtxError(instruction.text)
        is_load = instruction.opcode[0] == "ldmatrix"
        registers, place = instruction.operands if is_load else instruction.operands[::-1]
        address = self._address(place).astype(np.int64) % _SHARED_BYTES
        lane = np.arange(len(self._threads)) % _WARP
        loaded = []
        for number, name in enumerate(registers):
            row = address[self._warps * _WARP + 8 * number + lane // 4]
            places = (row + 4 * (lane % 4))[:, None] + np.arange(4)
            if is_load:
                bits = self._shared[places].view(np.uint32)[:, 0].astype(_U64)
                loaded.append(_Value(bits, self._none))
            else:
                self._shared[places] = self._get(name).bits.copy().view(np.uint8).reshape(-1, 8)[:, :4]
        if is_load:
            self._set(registers, loaded, None)
