"""What a table looks like: histograms of scores and of row norms, the rows that are worth most and least.

Everything is counted in pieces: scores are read twice (8 bytes for each row: their range decides about the bins),
values once. Nothing is checked but sizes; :mod:`dynamicemb.checkpoint.inspection.verify` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.reader import PIECE_BYTES, StoredTable
from dynamicemb.checkpoint.files.schema import KEYS, SCORES, VALUES
from dynamicemb.checkpoint.formats.exchange import as_float32

__all__ = ["Histogram", "NormSummary", "RankedRow", "ScoreSummary", "TableSummary", "row_norms", "summarize"]

#: Bins of a histogram, at most.
BINS = 16
#: Logarithmic bins where the largest number is more than this many times the mean.
_SKEW = 8
#: Norms are counted by the upper bits of their float32 pattern: 2048 bins for each power of two.
_NORM_SHIFT = 12
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Histogram:
    """Counts by bin: bin ``i`` goes from ``edges[i]`` to ``edges[i + 1]``, the last one with its upper edge.

    Attributes:
        edges: one more than counts, ascending.
        counts: rows in each bin.
        logarithmic: whether bins grow by a factor rather than by a difference.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    logarithmic: bool


@dataclass(frozen=True)
class RankedRow:
    """A row that stands out by its score.

    Attributes:
        key, score: its own.
        norm: Euclidean norm of its embedding.
        row: its number in the files.
    """

    key: int
    score: int
    norm: float
    row: int


@dataclass(frozen=True)
class ScoreSummary:
    """Scores of a table with at least one row. ``top`` starts with the highest, ``bottom`` with the lowest; among
    equal scores the earlier row comes first."""

    smallest: int
    mean: float
    largest: int
    histogram: Histogram
    top: tuple[RankedRow, ...]
    bottom: tuple[RankedRow, ...]


@dataclass(frozen=True)
class NormSummary:
    """Euclidean norms of embeddings; None where no norm is finite.

    Attributes:
        smallest, largest: of the finite norms.
        median: of the finite norms, to within 0.05 %.
        zero: rows that are all zeros.
        non_finite: rows with an infinity or a NaN, or beyond the range of float32.
        histogram: of the finite norms.
    """

    smallest: Optional[float]
    median: Optional[float]
    largest: Optional[float]
    zero: int
    non_finite: int
    histogram: Optional[Histogram]


@dataclass(frozen=True)
class TableSummary:
    """Both summaries; None for a table without rows."""

    scores: Optional[ScoreSummary]
    norms: Optional[NormSummary]


def row_norms(values: np.ndarray, dtype: str) -> np.ndarray:
    """Euclidean norms of rows, [n, dim] as on disk: float32 [n], summed in float64."""
    wide = as_float32(values, dtype).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.einsum("ij,ij->i", wide, wide)).astype(np.float32)


def summarize(table: StoredTable, ranked: int = 5, progress: Optional[Progress] = None) -> TableSummary:
    """Reads a table once and its scores twice.

    Args:
        table: open for reading.
        ranked: rows to name at each end of the order of scores.
        progress: called with (table, rows done, rows).
    """
    if table.rows == 0:
        return TableSummary(None, None)
    return TableSummary(_scores(table, ranked), _norms(table, progress))


def _pieces(table: StoredTable, part: str) -> Iterator[tuple[int, np.ndarray]]:
    row_bytes = next(entry.row_bytes for entry in table.record.schema.parts if entry.name == part)
    # A quarter of a piece: norms are taken in float64, twice to four times the size.
    step = max(1, PIECE_BYTES // 4 // row_bytes)
    for first in range(0, table.rows, step):
        yield first, table.read_part(part, first, min(first + step, table.rows))


class _Extremes:
    """The ``count`` rows with the lowest scores so far; with ``sign`` -1, with the highest."""

    def __init__(self, count: int, sign: int) -> None:
        self._count, self._sign = count, sign
        self._ranks, self._rows = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, first: int, scores: np.ndarray) -> None:
        # ~score reverses the order of int64 without overflow, which -score does not.
        ranks = scores if self._sign > 0 else ~scores
        if self._ranks.size == self._count:  # few rows of a later piece are among the extremes: sort only those
            better = np.flatnonzero(ranks < self._ranks[-1])
        else:
            better = np.arange(ranks.size)
        ranks, rows = np.concatenate([self._ranks, ranks[better]]), np.concatenate([self._rows, first + better])
        order = np.argsort(ranks, kind="stable")[: self._count]
        self._ranks, self._rows = ranks[order], rows[order]

    def ranked(self, table: StoredTable) -> tuple[RankedRow, ...]:
        scores = self._ranks if self._sign > 0 else ~self._ranks
        return tuple(self._read(table, int(score), int(row)) for score, row in zip(scores, self._rows))

    @staticmethod
    def _read(table: StoredTable, score: int, row: int) -> RankedRow:
        values = table.read_part(VALUES, row, row + 1)
        key = int(table.read_part(KEYS, row, row + 1)[0])
        return RankedRow(key, score, float(row_norms(values, table.record.schema.dtype)[0]), row)


def _scores(table: StoredTable, ranked: int) -> ScoreSummary:
    lowest, highest = _Extremes(max(1, ranked), 1), _Extremes(max(1, ranked), -1)
    total = 0
    for first, scores in _pieces(table, SCORES):
        lowest.add(first, scores)
        highest.add(first, scores)
        # Halves of 32 bits: their sums cannot overflow, the sum of the scores can.
        total += (int((scores >> 32).sum()) << 32) + int((scores & 0xFFFFFFFF).sum())
    top, bottom = highest.ranked(table), lowest.ranked(table)
    smallest, largest, mean = bottom[0].score, top[0].score, total / table.rows
    logarithmic = smallest >= 0 and largest > _SKEW * mean
    edges = _logarithmic_edges(smallest, largest) if logarithmic else _linear_edges(smallest, largest)
    counts = np.zeros(len(edges) - 1, np.int64)
    lower = np.array(edges[:-1], np.int64)
    for _, scores in _pieces(table, SCORES):
        counts += np.bincount(np.searchsorted(lower, scores, side="right") - 1, minlength=counts.size)
    histogram = Histogram(tuple(edges), tuple(counts.tolist()), logarithmic)
    return ScoreSummary(smallest, mean, largest, histogram, top[:ranked], bottom[:ranked])


def _linear_edges(smallest: int, largest: int) -> list[int]:
    """Bins of one whole width; the upper edge of the last is the largest score."""
    width = max(1, -(-(largest - smallest + 1) // BINS))
    return [*range(smallest, largest + 1, width), largest]


def _logarithmic_edges(smallest: int, largest: int) -> list[int]:
    """Bins from one power to the next of the least power of two that needs no more than the bins there are."""
    bits = -(-largest.bit_length() // (BINS - 1))
    powers = [0, *(1 << shift for shift in range(0, largest.bit_length(), bits)), largest]
    first = max(index for index, power in enumerate(powers[:-1]) if power <= smallest)
    return powers[first:]


def _norms(table: StoredTable, progress: Optional[Progress]) -> NormSummary:
    fine = np.zeros(1 << (31 - _NORM_SHIFT), np.int64)
    smallest, largest, non_finite, zero, total = np.inf, -np.inf, 0, 0, 0.0
    for first, values in _pieces(table, VALUES):
        norms = row_norms(values, table.record.schema.dtype)
        finite = norms[np.isfinite(norms)]
        non_finite += norms.size - finite.size
        zero += int((finite == 0).sum())
        if finite.size:
            smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
            total += float(finite.sum(dtype=np.float64))
            # Non-negative floats are in the order of their bits. bincount of the distinct ones: cheap for small pieces.
            bins, counts = np.unique(finite.view(np.uint32) >> np.uint32(_NORM_SHIFT), return_counts=True)
            fine[bins] += counts
        if progress is not None:
            progress(table.table, first + norms.size, table.rows)
    if non_finite == table.rows:
        return NormSummary(None, None, None, 0, non_finite, None)
    middles, counts = _fine_bins(fine, smallest, largest)
    median = float(middles[np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2)])
    histogram = _norm_histogram(middles, counts, smallest, largest, total / counts.sum())
    return NormSummary(smallest, median, largest, zero, non_finite, histogram)


def _fine_bins(fine: np.ndarray, smallest: float, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """The middles of bins that are not empty, no nearer to the ends than the numbers there, and their counts."""
    bins = np.flatnonzero(fine)
    patterns = (bins.astype(np.uint32) << np.uint32(_NORM_SHIFT)) | np.uint32(1 << (_NORM_SHIFT - 1))
    return np.clip(patterns.view(np.float32).astype(np.float64), smallest, largest), fine[bins]


def _norm_histogram(middles: np.ndarray, counts: np.ndarray, smallest: float, largest: float, mean: float) -> Histogram:
    logarithmic = bool(largest > _SKEW * mean)
    if smallest == largest:
        return Histogram((smallest, largest), (int(counts.sum()),), False)
    if logarithmic:
        least = float(middles[middles > 0][0])  # zeros go to the first bin
        edges = np.geomspace(min(least, largest / 2), largest, BINS + 1)
        edges[0] = smallest
    else:
        # Few distinct norms: no more bins than could have different counts.
        edges = np.linspace(smallest, largest, min(BINS, max(1, counts.size)) + 1)
    which = np.clip(np.searchsorted(edges, middles, side="right") - 1, 0, edges.size - 2)
    binned = np.bincount(which, weights=counts, minlength=edges.size - 1).astype(np.int64)
    return Histogram(tuple(edges.tolist()), tuple(binned.tolist()), logarithmic)
