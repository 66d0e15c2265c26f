"""Races inside a program: accesses of two warps to one address of global memory, one of them a store, and no barrier
that lies between them on every way through the code.

The threads of a warp run in step, and Triton puts the barriers that its exchanges through shared memory need. It puts
none for global memory: where a kernel reads again what it wrote, or writes where other warps may still read, the kernel
needs a ``tl.debug_barrier()`` or an exchange in between. Neither the interpreter nor a test on a GPU shows that one is
missing, unless a warp happens to be late.

PTX is cut into pieces (:mod:`~ahead_of_time.ptx`). For any two pieces with accesses of which the second can follow the
first without a barrier, a way through the code that does so runs with made-up values
(:mod:`~ahead_of_time.made_up_run`), and addresses are compared, whatever the branches on that way ask for. So an access
that only some ways make equal to another may be missed; one that is found needs no luck to be found again.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Optional

import numpy as np

from ahead_of_time.made_up_run import Access, MadeUpRun
from ahead_of_time.ptx import Instruction, Program, parse, threads_of

__all__ = ["races"]

_WARP = 32
#: Two pieces of a program without a barrier between; None: one piece alone.
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
            for one, other in _racing(program, _way(program, pair), covered):
                found[f"no barrier between {one} and {other} of another warp"] = None
    return [*found]


def _pairs(program: Program) -> Iterator[_Pair]:
    """Pieces with accesses, each alone, and then with those that can follow it without a barrier."""
    accessing = {
        number
        for number, piece in enumerate(program.pieces)
        if any(instruction.accesses_global_memory for instruction in piece.instructions)
    }
    reachable = _reached(program, [0], through_barriers=True).keys()
    for first in sorted(accessing & reachable):
        yield first, None
        after = _reached(program, _next(program, first), through_barriers=False)
        yield from ((first, second) for second in reversed(after) if second in accessing)


def _next(program: Program, piece: int, through_barriers: bool = False) -> list[int]:
    if program.pieces[piece].ends_in_barrier and not through_barriers:
        return []
    return program.pieces[piece].successors


def _reached(program: Program, starts: Iterable[int], through_barriers: bool) -> dict[int, Optional[int]]:
    """Pieces that can be reached from ``starts``, each with the one before it on a shortest way; None at a start."""
    before: dict[int, Optional[int]] = dict.fromkeys(starts)
    waiting = deque(before)
    while waiting:
        piece = waiting.popleft()
        for after in _next(program, piece, through_barriers):
            if after not in before:
                before[after] = piece
                waiting.append(after)
    return before


def _shortest(program: Program, starts: Iterable[int], end: int, through_barriers: bool) -> list[int]:
    before = _reached(program, starts, through_barriers)
    way = [end]
    while (piece := before[way[-1]]) is not None:
        way.append(piece)
    return way[::-1]


def _way(program: Program, pair: _Pair) -> list[int]:
    """A shortest way from the beginning to the first piece, and from there without a barrier to the second one."""
    first, second = pair
    way = _shortest(program, [0], first, through_barriers=True)
    if second is not None:
        way += _shortest(program, _next(program, first), second, through_barriers=False)
    return way


def _racing(program: Program, way: list[int], covered: set[_Pair]) -> Iterator[tuple[Instruction, Instruction]]:
    """Instructions that race on ``way``. Adds the pairs of pieces that it shows to ``covered``, and skips those."""
    run = MadeUpRun(program)
    since_barrier: list[tuple[int, list[Access]]] = []
    for number in way:
        piece = program.pieces[number]
        accesses = [access for instruction in piece.instructions if (access := run.run(instruction)) is not None]
        candidates = [] if (number, None) in covered else [*itertools.combinations(accesses, 2)]
        for earlier, before in since_barrier:
            if (earlier, number) not in covered:
                candidates += itertools.product(before, accesses)
        covered |= {(number, None), *((earlier, number) for earlier, _ in since_barrier)}
        yield from ((one.instruction, other.instruction) for one, other in candidates if _race(one, other))
        since_barrier = [] if piece.ends_in_barrier else [*since_barrier, (number, accesses)]


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
