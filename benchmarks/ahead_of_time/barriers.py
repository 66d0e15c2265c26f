"""Data races inside a program: two warps access one address of global memory, one of them writes, and there is a path
through the code on which no barrier lies between the two accesses.

Triton takes the threads of a warp to run in step, and puts barriers around its own exchanges through shared memory. It
puts none between accesses to global memory: a kernel that reads what other warps have written, or writes what other
warps may not have read yet, needs a ``tl.debug_barrier()`` between, or an exchange. Nothing fails where one is missing
until a warp happens to be late, and in the interpreter never.

For each two basic blocks of which the second can follow the first without a barrier, a path that does so is run by
random interpretation (:mod:`~ahead_of_time.random_interpretation`), and the addresses are compared. Whether branches
would ever take that path is not asked. Not seen are races between programs, addresses that are equal by the values of
the data only or only on a longer path, and tensors that share memory.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Optional

import numpy as np

from ahead_of_time.ptx import Instruction, Program, parse, threads_of
from ahead_of_time.random_interpretation import Access, RandomInterpreter

__all__ = ["races"]

_WARP = 32
#: Two blocks of which the second follows the first without a barrier; None: one block alone.
_Pair = tuple[int, Optional[int]]


def races(ptx: str) -> list[str]:
    """A line for each two instructions of the kernel that race; none for a kernel of one warp.

    Raises:
        PtxError: the kernel has something that is not understood, and so not checked.
    """
    if threads_of(ptx) <= _WARP:
        return []
    program = parse(ptx)
    found: dict[str, None] = {}
    covered: set[_Pair] = set()
    for pair in _pairs(program):
        if pair not in covered:
            for one, other in _racing(program, _path(program, pair), covered):
                found[f"no barrier between {one} and {other} of another warp"] = None
    return [*found]


def _pairs(program: Program) -> Iterator[_Pair]:
    """Blocks with accesses, each alone, and then with those that can follow it without a barrier."""
    accessing = {
        number
        for number, block in enumerate(program.blocks)
        if any(instruction.accesses_global_memory for instruction in block.instructions)
    }
    reachable = _reached(program, [0], through_barriers=True).keys()
    for first in sorted(accessing & reachable):
        yield first, None
        after = _reached(program, _next(program, first), through_barriers=False)
        yield from ((first, second) for second in reversed(after) if second in accessing)


def _next(program: Program, block: int, through_barriers: bool = False) -> list[int]:
    if program.blocks[block].ends_in_barrier and not through_barriers:
        return []
    return program.blocks[block].successors


def _reached(program: Program, starts: Iterable[int], through_barriers: bool) -> dict[int, Optional[int]]:
    """Blocks that can be reached from ``starts``, each with the one before it on a shortest path; None for a start."""
    before: dict[int, Optional[int]] = dict.fromkeys(starts)
    waiting = deque(before)
    while waiting:
        block = waiting.popleft()
        for after in _next(program, block, through_barriers):
            if after not in before:
                before[after] = block
                waiting.append(after)
    return before


def _shortest(program: Program, starts: Iterable[int], end: int, through_barriers: bool) -> list[int]:
    before = _reached(program, starts, through_barriers)
    path = [end]
    while (block := before[path[-1]]) is not None:
        path.append(block)
    return path[::-1]


def _path(program: Program, pair: _Pair) -> list[int]:
    """A shortest path from the beginning to the first block, and from there without a barrier to the second one."""
    first, second = pair
    path = _shortest(program, [0], first, through_barriers=True)
    if second is not None:
        path += _shortest(program, _next(program, first), second, through_barriers=False)
    return path


def _racing(program: Program, path: list[int], covered: set[_Pair]) -> Iterator[tuple[Instruction, Instruction]]:
    """Instructions that race on ``path``. Skips pairs of blocks that are ``covered``, and adds those on the path."""
    run = RandomInterpreter(program)
    since_barrier: list[tuple[int, list[Access]]] = []
    for number in path:
        block = program.blocks[number]
        accesses = [access for instruction in block.instructions if (access := run.run(instruction)) is not None]
        candidates = [] if (number, None) in covered else [*itertools.combinations(accesses, 2)]
        for earlier, before in since_barrier:
            if (earlier, number) not in covered:
                candidates += itertools.product(before, accesses)
        covered |= {(number, None), *((earlier, number) for earlier, _ in since_barrier)}
        yield from ((one.instruction, other.instruction) for one, other in candidates if _race(one, other))
        since_barrier = [] if block.ends_in_barrier else [*since_barrier, (number, accesses)]


def _race(one: Access, other: Access) -> bool:
    """Whether the two have bytes in common in different warps, and one of them writes. Atomic ones do not race.

    A load races if a thread may run it. Two stores race where these values let both run: other threads than those often
    compute an address that is not theirs.
    """
    kinds = {access.instruction.opcode[0] for access in (one, other)}
    if kinds == {"ld"} or kinds <= {"atom", "red"}:
        return False
    addresses, warps = zip(*(_by_thread(access, both_write="ld" not in kinds) for access in (one, other)))
    order = np.argsort(addresses[1], kind="stable")
    sorted_addresses, sorted_warps = addresses[1][order], warps[1][order]
    # Entries `begin` to `end` of the other access have bytes in common with each thread of the one.
    begin = np.searchsorted(sorted_addresses, addresses[0] - np.uint64(other.num_bytes - 1))
    end = np.searchsorted(sorted_addresses, addresses[0] + np.uint64(one.num_bytes))
    while (waiting := begin < end).any():
        if (sorted_warps[begin[waiting]] != warps[0][waiting]).any():
            return True
        begin = begin + 1
    return False


def _by_thread(access: Access, both_write: bool) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and warps of the threads that count."""
    (threads,) = np.nonzero(access.runs if both_write else access.may_run)
    return access.addresses[threads], threads // _WARP
