"""A full checkpoint and the deltas that follow it, read as the one table that they stand for.

All files are in the order of the mixed key, so they are merged as streams: of each a block is in memory, and what lies
below the least end of a block is complete. The newest row of a key is the one that counts; a key that a delta says has
gone takes older rows with it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.crc import Span, SpanSums
from dynamicemb.checkpoint.files.lineage import ancestor_of, continues, described
from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import PIECE_BYTES, Piece, StoredTable, check_order
from dynamicemb.checkpoint.files.schema import EVICTED, EVICTED_PART, KEYS, Part, Rows, TableSchema, mixed_keys
from dynamicemb.checkpoint.passes import Spans
from dynamicemb.errors import CheckpointError

__all__ = ["ChainPass", "ChainedTable", "MergedPiece", "check_links"]

_ORDER = "give the full checkpoint first and all deltas after it, in the order in which they were written"


def _check_base(first: StoredTable) -> None:
    """Raises unless ``first`` can begin a chain: it is all of a table."""
    if first.record.since is not None:
        raise CheckpointError(
            f"{first.folder}: a delta, with what changed in table '{first.table}' since step {first.record.since}; "
            f"it needs what it follows: {_ORDER}"
        )


def check_links(tables: Sequence[StoredTable]) -> None:
    """Raises unless each of ``tables`` but the first is a delta that continues what the one before left.

    Raises:
        CheckpointError: one is no delta, of another kind of table, begins after the one before ended (a gap), ends
            before it (a wrong order), or was written by a run that has not been where the one before is (of another
            run).
    """
    for previous, delta in itertools.pairwise(tables):
        where, before, record = f"{delta.folder}: table '{delta.table}'", previous.record, delta.record
        if record.since is None:
            raise CheckpointError(f"{delta.folder}: a full checkpoint, which can only be the first; {_ORDER}")
        _check_alike(where, record, previous)
        if before.clock > record.clock:
            raise CheckpointError(
                f"{where} is of step {record.clock}, but {previous.folder} before it is of step {before.clock}: "
                f"a wrong order; {_ORDER}"
            )
        if record.since > before.clock:
            raise CheckpointError(
                f"{where} has what changed since step {record.since}, but {previous.folder} before it ends at step "
                f"{before.clock}: a gap; give the deltas in between, too, in the order in which they were written"
            )
        if not continues(before, record, delta.table):
            raise CheckpointError(
                f"{where} follows {described(record.follows or ())}, but {previous.folder} before it is "
                f"{described([ancestor_of(before, delta.table)])}: they are of different runs, or of one that went on "
                "from an earlier checkpoint in between; give the checkpoints of one run"
            )


def _check_alike(where: str, record: TableRecord, previous: StoredTable) -> None:
    before = previous.record
    if (record.optimizer.saved, before.optimizer.saved) in ((True, False), (False, True)):
        has, other = ("has", "has none") if record.optimizer.saved else ("has no", "has it")
        raise CheckpointError(
            f"{where} {has} optimizer state, but {previous.folder} before it {other}; dump all checkpoints of a chain "
            "with the same optim"
        )
    for what, found, expected in (
        ("dim", record.schema.dim, before.schema.dim),
        ("dtype", record.schema.dtype, before.schema.dtype),
        ("optimizer", record.optimizer.kind, before.optimizer.kind),
        ("optimizer state", record.schema.states, before.schema.states),
        ("evict_strategy", record.evict_strategy, before.evict_strategy),
    ):
        if found != expected:
            raise CheckpointError(
                f"{where} has {what} {found}, but {previous.folder} before it has {expected}; "
                "they are not of one training run: give the checkpoints of one"
            )


class ChainedTable:
    """A table of a full checkpoint with the deltas that follow it: a source of rows, as a full one is.

    Args:
        tables: the table of the full checkpoint, then those of the deltas, in order.

    Attributes:
        record: what the manifest of the later full checkpoint says of the table, but for its files.

    Raises:
        CheckpointError: they are no chain. Only manifests have been looked at then.
    """

    def __init__(self, tables: Sequence[StoredTable]) -> None:
        _check_base(tables[0])
        check_links(tables)
        self.tables: Sequence[StoredTable] = tables
        last = tables[-1].record
        self.record: TableRecord = dataclasses.replace(last, rows=last.table_rows, since=None, parts={})

    def between(self, first: int, stop: int) -> ChainPass:
        """A pass over mixed keys ``first`` to ``stop`` (exclusive; from 0 to 2**64)."""
        return ChainPass(self.tables, first, stop)


@dataclasses.dataclass(frozen=True)
class MergedPiece:
    """What the streams hold of a range of mixed keys, both in ascending order of the mixed key.

    Attributes:
        piece: rows.
        gone: int64 [n], keys whose last mention says that they have gone.
    """

    piece: Piece
    gone: np.ndarray


class ChainPass:
    """A pass over a range of mixed keys; iterating it yields the rows that count.

    Memory: one block of each file, :data:`~dynamicemb.checkpoint.files.reader.PIECE_BYTES` for all rows together, and
    as much for the rows that are yielded. Each byte is read once; order is checked in every file, tombstones included.

    Args:
        tables: in order, oldest first.
        first, stop: the mixed keys.

    Attributes:
        rows: how many to expect; exact for a pass over everything, else in proportion to what is read.
    """

    def __init__(self, tables: Sequence[StoredTable], first: int, stop: int) -> None:
        self._schema: TableSchema = tables[0].record.schema
        step = max(1, PIECE_BYTES // self._schema.row_bytes // len(tables))
        self._tables = len(tables)
        self._streams: list[_Stream] = []
        for number, table in enumerate(tables):
            self._streams.append(_Stream(table, number, KEYS, self._schema.parts, first, stop, step))
            if table.record.since is not None:
                self._streams.append(_Stream(table, number, EVICTED, (EVICTED_PART,), first, stop, step))
        # A delta with every row of its table leaves nothing of what came before it.
        self._oldest = max(
            n for n, table in enumerate(tables) if table.record.rows == table.record.table_rows or n == 0
        )
        here = sum(stream.length for stream in self._streams if not stream.gone)
        everywhere = sum(table.rows for table in tables)
        self.rows = min(here, -(-tables[-1].record.table_rows * here // max(1, everywhere)))

    def __iter__(self) -> Iterator[Piece]:
        for merged in self.merged():
            if len(merged.piece.rows):
                yield merged.piece

    def merged(self) -> Iterator[MergedPiece]:
        """Rows, and keys that have gone."""
        while self._fill():
            limits = [limit for stream in self._streams if (limit := stream.limit()) is not None]
            bound = min(limits, default=None)
            yield self._newest([(stream, stream.take(bound)) for stream in self._streams])

    def _fill(self) -> bool:
        filled = [stream.fill() for stream in self._streams]
        return any(filled)

    def _newest(self, taken: list[tuple[_Stream, Piece]]) -> MergedPiece:
        """Of each key what the newest table says."""
        taken = [(stream, piece) for stream, piece in taken if len(piece.rows.arrays[stream.keys_part])]
        nothing = np.empty(0, np.int64)
        if len(taken) == 1 and not taken[0][0].gone and taken[0][0].number >= self._oldest:
            return MergedPiece(taken[0][1], nothing)
        mixed = np.concatenate([piece.mixed for _, piece in taken])
        starts = np.cumsum([0, *(len(piece.mixed) for _, piece in taken)])
        order = np.argsort(mixed, kind="stable")  # finds the sorted runs; among equal keys the newest comes last
        mixed = mixed[order]
        origin = np.searchsorted(starts, order, side="right") - 1
        numbers, gone = (np.array([getattr(stream, name) for stream, _ in taken]) for name in ("number", "gone"))
        last = np.append(mixed[1:] != mixed[:-1], True)
        twice = np.flatnonzero(~last[:-1] & (numbers[origin[1:]] == numbers[origin[:-1]]))
        if twice.size:
            stream, piece = taken[origin[twice[0]]]
            raise stream.contradiction(int(piece.rows.keys[order[twice[0]] - starts[origin[twice[0]]]]))
        here = last & ~gone[origin] & (numbers[origin] >= self._oldest)
        rows = self._collected(taken, origin[here], order[here] - starts[origin[here]])
        keys = np.concatenate([piece.rows.arrays[stream.keys_part] for stream, piece in taken])
        return MergedPiece(Piece(rows, mixed[here]), keys[order[last & gone[origin]]])

    def _collected(self, taken: list[tuple[_Stream, Piece]], origin: np.ndarray, rows: np.ndarray) -> Rows:
        """Row ``rows[i]`` of run ``origin[i]``, for each i."""
        result = self._schema.empty(rows.size)
        for run, (stream, piece) in enumerate(taken):
            if stream.gone:
                continue
            places = np.flatnonzero(origin == run)
            for name, array in result.arrays.items():
                array[places] = piece.rows.arrays[name][rows[places]]
        return result

    @property
    def spans(self) -> Spans:
        """Checksums of what has been read, by table, once all of it has been."""
        spans: list[dict[str, list[Span]]] = [{} for _ in range(self._tables)]
        for stream in self._streams:
            spans[stream.number] |= stream.spans
        return list(spans)


class _Stream:
    """Rows of one stored table, or its keys that have gone, block by block.

    Args:
        table: what to read.
        number: of the table in the chain, oldest first.
        keys_part: ``keys`` or ``evicted``.
        parts: what is read of each row; the keys come first.
        first, stop: the range of mixed keys.
        step: rows of a block.
    """

    def __init__(
        self, table: StoredTable, number: int, keys_part: str, parts: tuple[Part, ...], first: int, stop: int, step: int
    ) -> None:
        self.number, self.keys_part, self.gone = number, keys_part, keys_part == EVICTED
        self._table, self._parts, self._step = table, parts, step
        self._next, self._stop = table.position(first, keys_part), table.position(stop, keys_part)
        self.length = self._stop - self._next
        self._sums = {part.name: SpanSums(self._next, part.row_bytes, table.record.segment_rows) for part in parts}
        self._rows = Rows({part.name: part.empty(0) for part in parts})
        self._mixed = np.empty(0, np.uint64)
        # The key before the next one, whose order is checked with it; at first that of another range.
        self._last: Optional[np.ndarray] = None
        if self._next > 0:
            self._last = table.read_part(keys_part, self._next - 1, self._next)

    def fill(self) -> bool:
        """Reads a block if none is left. Returns whether anything is."""
        if self._mixed.size == 0 and self._next < self._stop:
            first, self._next = self._next, min(self._next + self._step, self._stop)
            arrays = {}
            for part in self._parts:
                arrays[part.name] = self._table.read_part(part.name, first, self._next)
                self._sums[part.name].add(arrays[part.name])
            keys = arrays[self.keys_part]
            self._rows, self._mixed = Rows(arrays), mixed_keys(keys)
            check_order(self._table.path(self.keys_part), first, keys, self._mixed, self._last)
            self._last = keys[-1:].copy()
        return self._mixed.size > 0

    def limit(self) -> Optional[int]:
        """The last mixed key up to which the block has everything; None: it has all that there is."""
        return int(self._mixed[-1]) if self._next < self._stop else None

    def take(self, bound: Optional[int]) -> Piece:
        """What the block has up to mixed key ``bound``; None: all of it."""
        count = self._mixed.size
        if bound is not None:
            count = int(np.searchsorted(self._mixed, np.uint64(bound), side="right"))
        taken = Piece(self._rows[:count], self._mixed[:count])
        self._rows, self._mixed = self._rows[count:], self._mixed[count:]
        return taken

    def contradiction(self, key: int) -> CheckpointError:
        return CheckpointError(
            f"{self._table.path(EVICTED)}: key {key} has gone, but {self._table.path(KEYS)} has it; "
            "restore the files from a copy, or use an earlier checkpoint"
        )

    @property
    def spans(self) -> dict[str, list[Span]]:
        return {name: sums.spans() for name, sums in self._sums.items()}
