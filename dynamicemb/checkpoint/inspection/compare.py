"""What differs between two checkpoints: a merge-join of two sorted runs, in bounded memory and one pass over each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import Checkpoint, Piece, StoredTable
from dynamicemb.checkpoint.files.schema import KEYS, SCORES, Part, Rows, mixed_keys
from dynamicemb.checkpoint.formats.exchange import as_float32
from dynamicemb.errors import CheckpointError

__all__ = [
    "Comparison",
    "KeyRun",
    "PartDifference",
    "Setting",
    "TableComparison",
    "compare",
    "compare_tables",
    "joined",
]

#: Keys of each kind that a comparison names; the others are counted.
EXAMPLES = 5
Progress = Callable[[str, int, int], None]


@dataclass
class KeyRun:
    """Keys of one kind: how many there are, and the first few of them in the order of the files."""

    count: int = 0
    examples: list[int] = field(default_factory=list)

    def add(self, keys: np.ndarray) -> None:
        self.count += keys.size
        self.examples += keys[: EXAMPLES - len(self.examples)].tolist()


@dataclass
class PartDifference:
    """One part of the rows that both have.

    Attributes:
        rows: rows in which it is not the same, bit for bit.
        max_difference: the largest absolute difference of two finite numbers: a float, or for scores an int.
        key: of the row that has it; None if no row differs by a finite amount.
        non_finite: differing numbers of which one is infinite or NaN.
    """

    rows: int = 0
    max_difference: float = 0
    key: Optional[int] = None
    non_finite: int = 0


@dataclass(frozen=True)
class Setting:
    """Something that the two manifests say differently, ``a`` and ``b``."""

    name: str
    a: Any
    b: Any


@dataclass
class TableComparison:
    """One table that both checkpoints have.

    Attributes:
        collection, table: which one.
        rows_a, rows_b: rows in its files.
        settings: fields of the manifest that differ, the spread over ranks left out.
        only_a, only_b: keys that one of them has.
        changed: keys that both have, with rows that are not the same bit for bit.
        common: keys that both have.
        parts: by name, those that both have in the same width.
        evicted_only_a, evicted_only_b: keys that only one of two deltas says have gone.
    """

    collection: str
    table: str
    rows_a: int
    rows_b: int
    settings: list[Setting]
    only_a: KeyRun = field(default_factory=KeyRun)
    only_b: KeyRun = field(default_factory=KeyRun)
    changed: KeyRun = field(default_factory=KeyRun)
    common: int = 0
    parts: dict[str, PartDifference] = field(default_factory=dict)
    evicted_only_a: KeyRun = field(default_factory=KeyRun)
    evicted_only_b: KeyRun = field(default_factory=KeyRun)

    @property
    def equal(self) -> bool:
        runs = (self.only_a, self.only_b, self.changed, self.evicted_only_a, self.evicted_only_b)
        return not self.settings and not any(run.count for run in runs)


@dataclass
class Comparison:
    """Two checkpoints.

    Attributes:
        kinds: ``full`` or ``delta``, of both.
        only_a, only_b: (collection, table) of tables that one of them has.
        tables: those that both have.
    """

    kinds: tuple[str, str]
    only_a: list[tuple[str, str]]
    only_b: list[tuple[str, str]]
    tables: list[TableComparison]

    @property
    def equal(self) -> bool:
        same = self.kinds[0] == self.kinds[1] and not self.only_a and not self.only_b
        return same and all(table.equal for table in self.tables)


def joined(a: Iterator[Piece], b: Iterator[Piece]) -> Iterator[tuple[Optional[Piece], Optional[Piece]]]:
    """Two runs of pieces cut so that both halves of each pair cover one range of mixed keys; None for no rows."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        if not (left.mixed.size and right.mixed.size):
            left, right = (left if left.mixed.size else next(a, None)), (right if right.mixed.size else next(b, None))
            continue
        end = min(left.mixed[-1], right.mixed[-1])
        cuts = [int(np.searchsorted(piece.mixed, end, side="right")) for piece in (left, right)]
        yield _cut(left, 0, cuts[0]), _cut(right, 0, cuts[1])
        left = _cut(left, cuts[0]) if cuts[0] < left.mixed.size else next(a, None)
        right = _cut(right, cuts[1]) if cuts[1] < right.mixed.size else next(b, None)
    while left is not None:
        yield left, None
        left = next(a, None)
    while right is not None:
        yield None, right
        right = next(b, None)


def _cut(piece: Piece, first: int, stop: Optional[int] = None) -> Piece:
    return Piece(piece.rows[first:stop], piece.mixed[first:stop])


def compare(
    a: Checkpoint,
    b: Checkpoint,
    progress: Optional[Progress] = None,
    tables: Optional[Collection[tuple[str, str]]] = None,
) -> Comparison:
    """Compares tables of two checkpoints, in bounded memory, reading each file once.

    Args:
        a, b: the checkpoints, both full or both deltas for a meaningful result.
        progress: called with (table, rows read, rows in both).
        tables: (collection, table) of those to compare; all of both without it.

    Raises:
        CheckpointError: a file is damaged.
    """
    of_a, of_b = ([name for name in one.tables if tables is None or name in tables] for one in (a, b))
    return Comparison(
        kinds=(a.manifest.kind, b.manifest.kind),
        only_a=[name for name in of_a if name not in b.tables],
        only_b=[name for name in of_b if name not in a.tables],
        tables=[compare_tables(a.tables[name], b.tables[name], progress) for name in of_a if name in b.tables],
    )


def compare_tables(a: StoredTable, b: StoredTable, progress: Optional[Progress] = None) -> TableComparison:
    """Compares two tables; see :func:`compare`."""
    result = TableComparison(a.collection, a.table, a.rows, b.rows, _settings(a.record, b.record))
    parts = _shared_parts(a.record, b.record)
    result.parts = {part.name: PartDifference() for part, _ in parts}
    done, total = 0, a.rows + b.rows
    for left, right in joined(_checked(a), _checked(b)):
        _join_keys(left, right, result.only_a, result.only_b)
        if left is not None and right is not None:
            _, in_a, in_b = np.intersect1d(left.mixed, right.mixed, assume_unique=True, return_indices=True)
            result.common += in_a.size
            _compare_rows(left.rows[in_a], right.rows[in_b], parts, result)
        done += sum(len(piece.rows) for piece in (left, right) if piece is not None)
        if progress is not None:
            progress(a.table, done, total)
    for left, right in joined(_evicted(a), _evicted(b)):
        _join_keys(left, right, result.evicted_only_a, result.evicted_only_b)
    return result


def _checked(table: StoredTable) -> Iterator[Piece]:
    """All rows. Raises at the end if checksums are wrong, sooner if the order is."""
    scan = table.scan()
    yield from scan
    if problems := table.check_spans(scan.spans):
        raise CheckpointError(str(problems[0]))


def _evicted(table: StoredTable) -> Iterator[Piece]:
    for keys in table.evicted():
        yield Piece(Rows({KEYS: keys}), mixed_keys(keys))


def _join_keys(left: Optional[Piece], right: Optional[Piece], only_a: KeyRun, only_b: KeyRun) -> None:
    for piece, other, run in ((left, right, only_a), (right, left, only_b)):
        if piece is not None:
            alone = slice(None) if other is None else ~np.isin(piece.mixed, other.mixed, assume_unique=True)
            run.add(piece.rows.keys[alone])


def _shared_parts(a: TableRecord, b: TableRecord) -> list[tuple[Part, Part]]:
    """Parts other than keys that both have in the same width."""
    of_b = {part.name: part for part in b.schema.parts}
    pairs = [(part, of_b[part.name]) for part in a.schema.parts if part.name in of_b and part.name != KEYS]
    return [(part, other) for part, other in pairs if part.width == other.width]


def _compare_rows(a: Rows, b: Rows, parts: list[tuple[Part, Part]], result: TableComparison) -> None:
    """Adds rows of the same keys."""
    changed = np.zeros(len(a), bool)
    for part, other in parts:
        left, right = (rows.arrays[part.name].reshape(len(rows), part.width or 1) for rows in (a, b))
        differs = _differing(left, right, part.dtype, other.dtype)
        rows = np.flatnonzero(differs.any(1))
        changed[rows] = True
        difference = result.parts[part.name]
        difference.rows += rows.size
        if rows.size == 0:
            continue
        if part.name == SCORES:
            _measure_scores(left[rows, 0], right[rows, 0], a.keys[rows], difference)
        else:
            floats = as_float32(left[rows], part.dtype), as_float32(right[rows], other.dtype)
            _measure_floats(*floats, differs[rows], a.keys[rows], difference)
    result.changed.add(a.keys[changed])


def _differing(a: np.ndarray, b: np.ndarray, dtype: str, other_dtype: str) -> np.ndarray:
    """bool [n, width]: not the same bits; of two dtypes, not the same as float32."""
    if dtype != other_dtype:
        a, b = as_float32(a, dtype), as_float32(b, other_dtype)
    bits = np.dtype(f"<u{a.dtype.itemsize}")
    return np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)


def _measure_scores(a: np.ndarray, b: np.ndarray, keys: np.ndarray, difference: PartDifference) -> None:
    # Unsigned: the difference of two int64 fits into 64 bits, not into 63.
    distances = np.maximum(a, b).view(np.uint64) - np.minimum(a, b).view(np.uint64)
    row = int(distances.argmax())
    if difference.key is None or int(distances[row]) > difference.max_difference:
        difference.max_difference, difference.key = int(distances[row]), int(keys[row])


def _measure_floats(
    a: np.ndarray, b: np.ndarray, differs: np.ndarray, keys: np.ndarray, difference: PartDifference
) -> None:
    finite = np.isfinite(a) & np.isfinite(b)
    difference.non_finite += int((differs & ~finite).sum())
    with np.errstate(invalid="ignore"):
        distances = np.where(differs & finite, np.abs(a.astype(np.float64) - b), -1.0).max(1)
    row = int(distances.argmax())
    if distances[row] >= 0 and (difference.key is None or distances[row] > difference.max_difference):
        difference.max_difference, difference.key = float(distances[row]), int(keys[row])


#: Fields of a record that say where rows were, or that every other difference shows anyway.
_NOT_SETTINGS = (
    "schema", "rows", "parts", "placement", "segment_rows", "keys_sum", "optimizer", "counters", "follows",
)  # fmt: skip


def _flat(record: TableRecord) -> dict[str, Any]:
    """Settings of a table by name; ``optimizer.lr`` and the like for those inside others."""
    flat: dict[str, Any] = {"dim": record.schema.dim, "dtype": record.schema.dtype}
    flat |= {f"states.{name}": width for name, width in record.schema.states}
    fields = {entry.name: getattr(record, entry.name) for entry in dataclasses.fields(record)}
    flat |= {name: value for name, value in fields.items() if name not in _NOT_SETTINGS}
    if record.since is None:  # the rows of the whole table are the rows of its files
        del flat["table_rows"]
    optimizer = dataclasses.asdict(record.optimizer)
    flat |= {f"optimizer.{name}": value for name, value in optimizer.pop("hyperparameters").items()}
    flat |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    flat |= {f"counters.{name}": value for name, value in dataclasses.asdict(record.counters).items()}
    return flat


def _settings(a: TableRecord, b: TableRecord) -> list[Setting]:
    of_a, of_b = _flat(a), _flat(b)
    names = [*of_a, *(name for name in of_b if name not in of_a)]
    return [Setting(name, of_a.get(name), of_b.get(name)) for name in names if of_a.get(name) != of_b.get(name)]
