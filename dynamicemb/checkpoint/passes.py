"""Where a table's rows come from when it is loaded: a pass over a range of mixed keys, of one checkpoint or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from dynamicemb.checkpoint.files.crc import Span
from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import Piece, Problem, Scan, StoredTable

__all__ = ["FullTable", "Pass", "Spans", "TableSource", "problems_of", "read_ahead"]

_Item = TypeVar("_Item")
#: Checksums of what a pass has read: by part, for each of the stored tables that it read from.
Spans = list[Mapping[str, list[Span]]]


class Pass(Protocol):
    """A pass over rows whose mixed keys lie in a range: iterating it yields them in order, each byte read once.

    Attributes:
        rows: how many they are, at most.
    """

    rows: int

    def __iter__(self) -> Iterator[Piece]: ...

    @property
    def spans(self) -> Spans:
        """Checksums of what has been read, once all of it has been."""
        ...


class TableSource(Protocol):
    """One table of a checkpoint, or of a full one and the deltas that follow it.

    Attributes:
        record: what the manifest says of the table as it will be.
        tables: the stored tables that are read.
    """

    record: TableRecord
    tables: Sequence[StoredTable]

    def between(self, first: int, stop: int) -> Pass:
        """A pass over mixed keys ``first`` to ``stop`` (exclusive; from 0 to 2**64)."""
        ...


class FullTable:
    """A table of a full checkpoint."""

    def __init__(self, table: StoredTable) -> None:
        self.record: TableRecord = table.record
        self.tables: Sequence[StoredTable] = [table]

    def between(self, first: int, stop: int) -> Pass:
        table = self.tables[0]
        return _FullPass(table.scan(table.position(first), table.position(stop)))


class _FullPass:
    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self.rows = scan.stop - scan.first

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._scan)

    @property
    def spans(self) -> Spans:
        return [self._scan.spans]


def problems_of(source: TableSource, spans_by_rank: Sequence[Spans]) -> list[Problem]:
    """What is wrong with the files of ``source``, from what all ranks together have read of them."""
    problems = []
    for number, table in enumerate(source.tables):
        by_part: dict[str, list[Span]] = {}
        for spans in spans_by_rank:
            for part, own in spans[number].items():
                by_part.setdefault(part, []).extend(own)
        problems += table.check_spans(by_part)
    return problems


def read_ahead(items: Iterable[_Item]) -> Iterator[_Item]:
    """``items``, of which the next one is made in a thread while the caller works on the last."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="dynamicemb-read") as pool:
        ahead = pool.submit(next, iterator, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, iterator, None)
            yield item
