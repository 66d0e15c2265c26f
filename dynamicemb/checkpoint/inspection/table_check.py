"""Everything that is wrong with the files of one table: each by itself, then what they say together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.crc import SpanSums, crc_of_segments
from dynamicemb.checkpoint.files.manifest import MANIFEST, PartRecord, TableRecord, file_name
from dynamicemb.checkpoint.files.reader import PIECE_BYTES
from dynamicemb.checkpoint.files.schema import EVICTED, KEYS, Part, mixed_keys
from dynamicemb.checkpoint.inspection.shares import Shares

__all__ = ["LISTED", "Finding", "TableCheck"]

#: Findings of one kind in one file that are listed; the rest are counted.
LISTED = 10
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        file: which file, relative to the checkpoint.
        offset: byte where it is; None for what concerns the file as a whole.
        message: what it is.
    """

    file: str
    offset: Optional[int]
    message: str

    def __str__(self) -> str:
        at = "" if self.offset is None else f", offset {self.offset}"
        return f"{self.file}{at}: {self.message}"


class _Listed:
    """Findings of one kind in one file: the first few, and how many there are. ``kind`` says what the others are."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self.first: list[tuple[Optional[int], str]] = []
        self.count = 0

    def add(self, offset: Optional[int], message: str) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append((offset, message))

    def findings(self, file: str) -> list[Finding]:
        findings = [Finding(file, offset, message) for offset, message in self.first]
        if self.count > len(self.first):
            findings.append(Finding(file, None, f"{self.count - len(self.first):,} more {self._kind}"))
        return findings


class _Order:
    """Whether keys ascend strictly by their mixed keys, from piece to piece; their sum; the ranks' shares of them."""

    def __init__(self, shares: Optional[Shares]) -> None:
        self.shares = shares
        self.wrong = _Listed("keys that occur twice or are out of order")
        self.keys_sum = 0
        self._last = np.empty(0, np.int64)
        self._rows = 0

    def add(self, keys: np.ndarray) -> None:
        mixed = mixed_keys(keys)
        self.keys_sum = (self.keys_sum + int(mixed.sum(dtype=np.uint64))) & _MASK
        run, run_mixed = np.concatenate([self._last, keys]), np.concatenate([mixed_keys(self._last), mixed])
        wrong = np.flatnonzero(run_mixed[1:] <= run_mixed[:-1])
        self.wrong.count += wrong.size
        for index in wrong[: LISTED - len(self.wrong.first)].tolist():
            key, previous = int(run[index + 1]), int(run[index])
            message = f"key {key} follows key {previous}, which its mixed key should not"
            if key == previous:
                message = f"key {key} occurs twice"
            self.wrong.first.append((8 * (self._rows + index + 1 - self._last.size), message))
        if self.shares is not None and not self.wrong.count:
            self.shares.add(keys)
        self._last, self._rows = keys[-1:].copy(), self._rows + keys.size


class TableCheck:
    """The files of one table. A file that is damaged does not keep the others from being checked.

    Args:
        folder: of the checkpoint.
        collection, table: which one.
        record: what the manifest says of it.
        read: called with (file, bytes) of every piece that has been read.
    """

    def __init__(
        self, folder: Path, collection: str, table: str, record: TableRecord, read: Callable[[str, int], None]
    ) -> None:
        self._folder, self._collection, self._table = folder, collection, table
        self._record, self._report = record, read
        self._findings: list[Finding] = []
        self._orders: dict[str, _Order] = {}  # of the files with keys that could be read

    def run(self) -> list[Finding]:
        """Reads every file once, and the keys of a delta once more. Returns everything that is wrong."""
        for part, entry in self._record.files:
            self._check_file(part, entry)
        self._check_rows()
        in_order = {name for name, order in self._orders.items() if not order.wrong.count}
        if KEYS in in_order:
            self._check_shares(self._orders[KEYS].shares)
        if {KEYS, EVICTED} <= in_order:
            self._check_evicted()
        return self._findings

    def _name(self, part: str) -> str:
        return f"{self._collection}/{file_name(self._table, part)}"

    def _find(self, part: str, offset: Optional[int], message: str) -> None:
        self._findings.append(Finding(self._name(part), offset, message))

    def _find_in_manifest(self, message: str) -> None:
        self._findings.append(Finding(MANIFEST, None, f"{self._collection}/{self._table}: {message}"))

    def _check_file(self, part: Part, entry: PartRecord) -> None:
        expected = entry.rows * part.row_bytes
        try:
            size = os.stat(self._folder / self._name(part.name)).st_size
            if size == expected:
                self._check_content(part, entry)
                return
        except OSError as error:
            self._find(part.name, None, error.strerror or str(error))
            return
        message = f"{size} bytes, but the manifest says {expected} ({entry.rows} rows of {part.row_bytes})"
        self._find(part.name, min(size, expected), message)

    def _check_content(self, part: Part, entry: PartRecord) -> None:
        """Checksums; of keys, also their order."""
        size = self._record.segment_rows
        sums = SpanSums(0, part.row_bytes, size)
        order = None
        if part.name in (KEYS, EVICTED):
            order = _Order(self._shares() if part.name == KEYS else None)
        for array in self._read(part, entry.rows):
            sums.add(array)
            if order is not None:
                order.add(array)
            self._report(self._name(part.name), array.nbytes)
        wrong = _Listed("segments with a wrong CRC-32")
        found = crc_of_segments(sums.spans(), entry.rows, part.row_bytes, size)
        for segment, (crc, stated) in enumerate(zip(found, entry.crc32, strict=True)):
            if crc != stated:
                message = f"segment {segment} has the CRC-32 {crc:08x}, but the manifest says {stated:08x}"
                wrong.add(segment * size * part.row_bytes, message)
        self._findings += wrong.findings(self._name(part.name))
        if order is not None:
            self._findings += order.wrong.findings(self._name(part.name))
            self._orders[part.name] = order

    def _shares(self) -> Optional[Shares]:
        if self._record.placement is None:
            return None
        try:
            return Shares(self._record.placement, self._record.bucket_capacity, LISTED)
        except ValueError as error:
            self._find_in_manifest(f"placement: {error}")
            return None

    def _read(self, part: Part, rows: int) -> Iterator[np.ndarray]:
        step = max(1, PIECE_BYTES // part.row_bytes)
        with open(self._folder / self._name(part.name), "rb", buffering=0) as file:
            for first in range(0, rows, step):
                array = part.empty(min(step, rows - first))
                view, done = array.reshape(-1).view(np.uint8).data, 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise OSError(0, "the file became shorter while it was read")
                    done += count
                yield array

    def _check_rows(self) -> None:
        """That the files hold the table that was dumped, as far as its manifest tells."""
        record = self._record
        if record.since is not None:
            if record.rows > record.table_rows:
                self._find_in_manifest(f"{record.rows} rows changed, of a table of {record.table_rows}")
            return
        if record.rows != record.table_rows:
            self._find_in_manifest(f"{record.rows} rows in the files, but the table had {record.table_rows}")
        if KEYS in self._orders and self._orders[KEYS].keys_sum != record.keys_sum:
            found = self._orders[KEYS].keys_sum
            message = f"the mixed keys add up to {found:016x}, but the manifest says {record.keys_sum:016x}"
            self._find(KEYS, None, message)

    def _check_shares(self, shares: Optional[Shares]) -> None:
        if shares is None:
            return
        shares.finish()
        crowded = _Listed("buckets with more rows than slots")
        crowded.first, crowded.count = [(None, message) for message in shares.crowded], shares.num_crowded
        self._findings += crowded.findings(self._name(KEYS))

    def _check_evicted(self) -> None:
        """That no key of a delta both has a row and has gone. Both files are in order: one pass over each."""
        rows, gone = (
            self._again(part, entry.rows) for part, entry in self._record.files if part.name in (KEYS, EVICTED)
        )
        here, there = next(rows, None), next(gone, None)
        both = _Listed("keys that have gone and have a row")
        offset = 0
        while here is not None and there is not None:
            end = min(here[1][-1], there[1][-1])  # whichever piece ends first has met all that it can
            twice = np.flatnonzero(np.isin(there[1], here[1], assume_unique=True))
            for row in twice.tolist():
                both.add(offset + 8 * row, f"key {there[0][row]} has gone, but has a row too")
            if here[1][-1] == end:
                here = next(rows, None)
            if there[1][-1] == end:
                offset += 8 * there[0].size
                there = next(gone, None)
        self._findings += both.findings(self._name(EVICTED))

    def _again(self, part: Part, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for keys in self._read(part, rows):
            yield keys, mixed_keys(keys)
