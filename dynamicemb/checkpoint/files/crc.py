"""CRC-32 of files that several processes write and read in pieces.

The polynomial is that of zlib and gzip (0xEDB88320, reflected). The CRC of two runs of bytes, one after the other,
follows from the CRC of each and the length of the second, so ranks whose rows meet inside a segment each take the CRC
of their own part, and no byte is read twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["Span", "SpanSums", "combine", "crc_of_segments", "num_segments"]

_POLYNOMIAL = 0xEDB88320
_ONE = 0x80000000  # the polynomial 1, in reflected order


def _product(a: int, b: int) -> int:
    """``a * b`` modulo the CRC polynomial, over GF(2)."""
    result, bit = 0, _ONE
    while bit:
        if a & bit:
            result ^= b
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two runs of bytes together, from that of each and the length of the second.

    Appending ``n`` bytes multiplies the CRC so far by ``x ** (8 * n)`` modulo the polynomial.
    """
    power, square, exponent = _ONE, 0x00800000, second_bytes  # square: x ** 8
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return _product(power, first) ^ second


@dataclass(frozen=True)
class Span:
    """The CRC-32 of rows ``first`` to ``stop`` (exclusive), all in segment ``segment``."""

    segment: int
    first: int
    stop: int
    crc: int


class SpanSums:
    """CRC-32 of a run of rows that arrives in pieces, cut where segments end.

    Args:
        first: number of the first row.
        row_bytes: bytes of a row.
        segment_rows: rows of a segment.
    """

    def __init__(self, first: int, row_bytes: int, segment_rows: int) -> None:
        self._row_bytes, self._segment_rows = row_bytes, segment_rows
        self._first = self._next = first
        self._crc = 0
        self._spans: list[Span] = []

    def add(self, rows: np.ndarray) -> None:
        """The rows that follow those added before; contiguous, ``row_bytes`` each."""
        data = rows.reshape(-1).view(np.uint8).data
        offset, left = 0, rows.shape[0]
        while left:
            count = min(left, self._segment_rows - self._next % self._segment_rows)
            self._crc = zlib.crc32(data[offset : offset + count * self._row_bytes], self._crc)
            offset, left, self._next = offset + count * self._row_bytes, left - count, self._next + count
            if self._next % self._segment_rows == 0:
                self._close()

    def _close(self) -> None:
        if self._next > self._first:
            self._spans.append(Span(self._first // self._segment_rows, self._first, self._next, self._crc))
        self._first, self._crc = self._next, 0

    def spans(self) -> list[Span]:
        """What has been added, in order. Nothing is added afterwards."""
        self._close()
        return self._spans


def num_segments(rows: int, segment_rows: int) -> int:
    return -(-rows // segment_rows)


def crc_of_segments(spans: Iterable[Span], rows: int, row_bytes: int, segment_rows: int) -> list[int]:
    """CRC-32 of every segment of a file of ``rows`` rows from spans that cover it, in any order."""
    sums = [0] * num_segments(rows, segment_rows)
    covered = 0
    for span in sorted(spans, key=lambda span: span.first):
        assert span.first == covered, "spans leave rows out, or have some twice"
        covered = span.stop
        sums[span.segment] = combine(sums[span.segment], span.crc, (span.stop - span.first) * row_bytes)
    assert covered == rows, "spans leave rows out at the end"
    return sums
