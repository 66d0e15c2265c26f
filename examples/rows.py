"""Rows of a click log in memory, and a source that decodes them chunk by chunk so that any range can be read."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LABEL = "label"
DENSE = tuple(f"i{number}" for number in range(1, 14))
CATEGORICAL = tuple(f"c{number}" for number in range(1, 27))


@dataclass(frozen=True)
class Rows:
    """N rows, column groups side by side.

    Attributes:
        labels: float32 [N], 0 or 1.
        dense: float32 [N, 13], counts as logged; 0 where the log has none.
        ids: int64 [N, 26]; 0 where the log has none.
        present: bool [N, 26], False where the log has none: that feature is then an empty bag, not id 0.
    """

    labels: torch.Tensor
    dense: torch.Tensor
    ids: torch.Tensor
    present: torch.Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.labels[rows], self.dense[rows], self.ids[rows], self.present[rows])

    @staticmethod
    def concatenated(parts: Sequence[Rows]) -> Rows:
        """``parts`` one after the other; no parts give no rows."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Rows(
                torch.empty(0),
                torch.empty(0, len(DENSE)),
                torch.empty(0, len(CATEGORICAL), dtype=torch.int64),
                torch.empty(0, len(CATEGORICAL), dtype=torch.bool),
            )
        columns = ("labels", "dense", "ids", "present")
        return Rows(*(torch.cat([getattr(part, column) for part in parts]) for column in columns))


@dataclass(frozen=True)
class Chunk:
    """``num_rows`` consecutive rows that are decoded together by calling ``load``."""

    num_rows: int
    load: Callable[[], Rows]


class RowSource:
    """Consecutive chunks as one log. Decodes a chunk when a row of it is read and keeps the last one decoded.

    Reading ranges in ascending order therefore decodes every chunk once and holds one chunk in memory.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = [chunk for chunk in chunks if chunk.num_rows]
        self._starts = [0]
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + chunk.num_rows)
        self._decoded_chunk = -1
        self._decoded = Rows.concatenated([])

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` (exclusive) of the log, both inside it.

        Raises:
            DataError: a row of a chunk that the range touches is malformed.
        """
        assert 0 <= start <= stop <= self.num_rows
        parts = []
        index = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[index], min(self._starts[index + 1], stop)
            parts.append(self._load(index)[start - first : end - first])
            start, index = end, index + 1
        return Rows.concatenated(parts)

    def _load(self, index: int) -> Rows:
        if index != self._decoded_chunk:
            self._decoded = self._chunks[index].load()
            self._decoded_chunk = index
        return self._decoded


@dataclass(frozen=True)
class RowRange:
    """The rows ``start`` to ``stop`` (exclusive) of ``source``: what an epoch walks through."""

    source: RowSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def split_tail(source: RowSource) -> tuple[RowRange, RowRange]:
    """All rows but the last tenth (rounded up), and the last tenth, in the order of the log."""
    tail = -(-source.num_rows // 10)
    boundary = source.num_rows - tail
    return RowRange(source, 0, boundary), RowRange(source, boundary, source.num_rows)
