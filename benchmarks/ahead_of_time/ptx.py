"""PTX of one kernel as data: its instructions, in basic blocks.

Only what Triton emits is read: one ``.entry`` without functions, and barriers that all threads of a program take part
in. Anything else raises a :class:`PtxError`, so that nobody believes that it was checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["Block", "Instruction", "Program", "PtxError", "parse", "threads_of"]

_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_REGISTERS = re.compile(r"\.reg\s+\.(pred|[bsuf]\d+)\s+(.*)")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\S*)\s*(.*)", re.DOTALL)
_BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned", "barrier.cta.sync.aligned")
# Operations that nothing but their operands decides.
_PURE = frozenset({
    "abs", "add", "and", "bfe", "bfi", "bfind", "brev", "clz", "cvt", "div", "ex2", "fma", "lg2", "lop3", "mad", "max",
    "min", "mov", "mul", "neg", "not", "or", "popc", "prmt", "rcp", "rem", "rsqrt", "selp", "setp", "shf", "shl", "shr",
    "sqrt", "sub", "tanh", "xor",
})  # fmt: skip
_OTHERS = frozenset({
    "atom", "bra", "exit", "fence", "ld", "ldmatrix", "membar", "red", "redux", "ret", "shfl", "st", "stmatrix", "trap",
})  # fmt: skip
_ENDS = ("ret", "exit", "trap")


class PtxError(ValueError):
    """PTX that nothing here knows how to read; the message has it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its qualifiers, ``("ld", "global", "v2", "b32")``.
        operands: results first; of a vector ``{a, b}`` or a pair ``p|q``, its elements.
        guard: register of the predicate that it runs under, or None; ``negated`` if it runs where that is false.
        place: file and line that it comes from, "" if unknown.
        text: as it was written.
    """

    opcode: tuple[str, ...]
    operands: tuple[tuple[str, ...], ...]
    guard: str | None
    negated: bool
    place: str
    text: str

    @property
    def is_barrier(self) -> bool:
        return ".".join(self.opcode) in _BARRIERS

    @property
    def is_pure(self) -> bool:
        """Whether it does nothing but compute its result from its operands."""
        return self.opcode[0] in _PURE

    @property
    def accesses_global_memory(self) -> bool:
        return self.opcode[0] in ("ld", "st", "atom", "red") and "global" in self.opcode

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.place})" if self.place else "")


@dataclass
class Block:
    """A basic block: instructions without a branch or a label between them, and without a barrier.

    Attributes:
        instructions: of the block; a branch or a barrier is the last one.
        successors: indices of the blocks that may follow.
        ends_in_barrier: whether all threads of the program wait for each other at its end.
    """

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    ends_in_barrier: bool = False


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        threads: of a program.
        registers: bits of each family of registers by prefix (``%rd``), 1 for predicates.
        blocks: of its code; it begins in the first one.
    """

    threads: int
    registers: dict[str, int]
    blocks: list[Block]

    def bits_of(self, register: str) -> int:
        bits = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if bits is None:
            raise PtxError(f"register {register}")
        return bits


def _elements(operand: str) -> tuple[str, ...]:
    operand = operand.strip()
    if operand.startswith("{"):
        return tuple(element.strip() for element in operand.strip("{}").split(","))
    return tuple(operand.split("|")) if operand.startswith("%") else (operand,)


def _instruction(statement: str, place: str) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise PtxError(statement)
    negation, guard, opcode, operands = match.groups()
    split = re.split(r",(?![^{\[]*[}\]])", operands) if operands else []
    instruction = Instruction(
        opcode=tuple(part for part in re.split(r"\.|::cta", opcode) if part),
        operands=tuple(_elements(operand) for operand in split),
        guard=guard,
        negated=bool(negation),
        place=place,
        text=" ".join(statement.split()),
    )
    if not _is_known(instruction):
        raise PtxError(instruction.text)
    return instruction


def _is_known(instruction: Instruction) -> bool:
    operation, *qualifiers = instruction.opcode
    if instruction.is_barrier:  # of all threads
        return instruction.guard is None and instruction.operands == (("0",),)
    if instruction.opcode == ("bar", "warp", "sync"):
        return True
    if operation in ("ld", "st", "atom", "red"):
        shared_or_param = ("shared", "param") if operation in ("ld", "st") else ()
        return any(space in qualifiers for space in ("global", *shared_or_param))
    return instruction.is_pure or operation in _OTHERS


def _declared(declaration: str) -> dict[str, int]:
    """``.reg .b32 %r<64>`` and ``.reg .pred p, q``."""
    match = _REGISTERS.fullmatch(declaration)
    if match is None:
        return {}
    kind, names = match.groups()
    bits = 1 if kind == "pred" else int(kind[1:])
    return {name.split("<")[0].strip(): bits for name in names.split(",")}


class _Builder:
    """Collects instructions in basic blocks, in the order of the text."""

    def __init__(self) -> None:
        self.blocks = [Block()]
        self.labels: dict[str, int] = {}
        self.branches: list[tuple[Block, str]] = []
        self.falls_through = True

    def begin_block(self) -> None:
        if self.falls_through:
            self.blocks[-1].successors.append(len(self.blocks))
        self.blocks.append(Block())
        self.falls_through = True

    def label(self, name: str) -> None:
        self.begin_block()
        self.labels[name] = len(self.blocks) - 1

    def append(self, instruction: Instruction) -> None:
        block = self.blocks[-1]
        block.instructions.append(instruction)
        if instruction.is_barrier:
            block.ends_in_barrier = True
        elif instruction.opcode[0] == "bra":
            self.branches.append((block, instruction.operands[0][0]))
            self.falls_through = instruction.guard is not None
        elif instruction.opcode[0] in _ENDS:
            self.falls_through = instruction.guard is not None
        else:
            return
        self.begin_block()

    def finished(self) -> list[Block]:
        for block, target in self.branches:
            block.successors.append(self.labels[target])
        return self.blocks


def threads_of(ptx: str) -> int:
    """Threads of a program."""
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    if threads is None:
        raise PtxError("the number of threads is not said")
    return int(threads[1])


def parse(ptx: str) -> Program:
    """The kernel in ``ptx``.

    Raises:
        PtxError: not the PTX of one kernel as Triton emits it.
    """
    body = re.search(r"^\{$(.*?)^\}", ptx, re.DOTALL | re.MULTILINE)
    if body is None:
        raise PtxError("no kernel")
    files = {number: "/".join(path.split("/")[-2:]) for number, path in _FILE.findall(ptx)}
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", body[1]))
    registers: dict[str, int] = {}
    builder = _Builder()
    place = unfinished = ""
    for line in body[1].splitlines():
        line = line.split("//")[0].strip()
        if location := _LOCATION.match(line):
            place = f"{files.get(location[1], '?')}:{location[2]}"
        elif label := re.fullmatch(r"([$\w]+):", line):
            if label[1] in targets:
                builder.label(label[1])
        else:
            *statements, unfinished = f"{unfinished} {line}".split(";")
            for statement in (each.strip().lstrip("{}").strip() for each in statements):
                if statement.startswith("."):
                    registers |= _declared(statement)
                else:
                    builder.append(_instruction(statement, place))
    if unfinished.strip(" {}"):
        raise PtxError(unfinished)
    return Program(threads_of(ptx), registers, builder.finished())
