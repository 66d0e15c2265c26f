"""What the device's memory can do: copies, random reads and sorts, measured before anything else in the same run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from gpu.traffic import SortWork, Traffic

__all__ = ["Ceilings"]


@dataclass
class Ceilings:
    """Filled in by the topic of the same name; expectations are made of these.

    Attributes:
        copy_bytes_per_s: read plus written by a copy from device to device; None before it is measured.
        random_reads_per_s: by size of the array in bytes, then by width of a read in bytes.
        sort_seconds: of torch's stable sort of integers with positions, by bytes of a key, then by number of keys.
    """

    copy_bytes_per_s: Optional[float] = None
    random_reads_per_s: dict[float, dict[int, float]] = field(default_factory=dict)
    sort_seconds: dict[int, dict[int, float]] = field(default_factory=dict)

    def copy_share(self, num_bytes: float, seconds: float) -> Optional[float]:
        """Share of the copy bandwidth at which ``num_bytes`` take ``seconds``."""
        return None if self.copy_bytes_per_s is None else num_bytes / seconds / self.copy_bytes_per_s

    def seconds(self, traffic: Traffic, array_bytes: Optional[float] = None) -> Optional[float]:
        """Least time for ``traffic``: streams at the speed of a copy, then random accesses, then sorts.

        Args:
            traffic: what is moved.
            array_bytes: size of what is accessed at random; None: the smallest array that was measured. Where no
                random read of a width was measured, its bytes count as streamed, and so do those of sorts.

        Returns:
            None before the copy is measured.
        """
        if self.copy_bytes_per_s is None:
            return None
        streamed, seconds = traffic.streamed_bytes, 0.0
        rates = self._rates(array_bytes)
        for width, count in traffic.accesses.items():
            if width in rates:
                seconds += count / rates[width]
            else:
                streamed += width * count
        for work in traffic.sorts:
            if work.key_bytes in self.sort_seconds:
                seconds += self._sort_seconds(work)
            else:
                streamed += work.num_bytes
        return seconds + streamed / self.copy_bytes_per_s

    def _rates(self, array_bytes: Optional[float]) -> dict[int, float]:
        sizes = sorted(self.random_reads_per_s)
        if not sizes:
            return {}
        return self.random_reads_per_s[next((size for size in sizes if size >= (array_bytes or 0)), sizes[-1])]

    def _sort_seconds(self, work: SortWork) -> float:
        measured = self.sort_seconds[work.key_bytes]
        counts = sorted(measured)
        if work.count > counts[-1]:
            return measured[counts[-1]] * work.count / counts[-1]
        return float(np.interp(work.count, counts, [measured[count] for count in counts]))
