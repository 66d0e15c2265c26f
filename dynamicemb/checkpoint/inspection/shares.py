"""Whether the ranks that wrote a table can have held its rows: each owns a range of mixed keys, bucket by bucket."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from dynamicemb.checkpoint.files.manifest import Placement
from dynamicemb.kernels.hashing import buckets, owners
from dynamicemb.kernels.layout import MAX_CHUNKS, TableGeometry

__all__ = ["Shares"]


class Shares:
    """Counts the rows of every bucket of every rank, from keys in ascending order of their mixed keys.

    Args:
        placement: what the manifest says about ranks.
        bucket_capacity: slots of a bucket.
        listed: buckets with more rows than slots that are named; the rest are counted.

    Attributes:
        crowded: what is to be said of the buckets with more rows than slots that are named.
        num_crowded: how many such buckets there are.

    Raises:
        ValueError: the slots of a rank are no size that a table passes through while it grows.
    """

    def __init__(self, placement: Placement, bucket_capacity: int, listed: int) -> None:
        self._world_size, self._capacity, self._listed = placement.world_size, bucket_capacity, listed
        self._max_buckets, rest = divmod(placement.max_slots, bucket_capacity)
        if rest or not self._max_buckets:
            raise ValueError(f"max_slots is {placement.max_slots}, not whole buckets of {bucket_capacity}")
        sizes = {self._slots(shift): shift for shift in reversed(range(MAX_CHUNKS))}
        for rank, slots in enumerate(placement.slots):
            if slots not in sizes:
                raise ValueError(
                    f"rank {rank} has {slots} slots, from which doubling does not lead to {placement.max_slots}"
                )
        self._shifts = [sizes[slots] for slots in placement.slots]
        # Of the last bucket so far: its rank and number, and its rows, to which the next piece may add.
        self._open: tuple[int, int] = (0, 0)
        self._open_rows = 0
        self.crowded: list[str] = []
        self.num_crowded = 0

    def _slots(self, shift: int) -> int:
        return TableGeometry(self._max_buckets, shift, 0, self._capacity).slots

    def add(self, keys: np.ndarray) -> None:
        """The next keys, int64 [n]."""
        tensor = torch.from_numpy(keys)
        ranks = owners(tensor, self._world_size).numpy()
        edges = [0, *(np.flatnonzero(np.diff(ranks)) + 1).tolist(), keys.size]
        for first, stop in itertools.pairwise(edges):
            rank = int(ranks[first])
            numbers = buckets(tensor[first:stop], self._world_size, self._max_buckets, self._shifts[rank]).numpy()
            starts = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1])
            counts = np.diff(starts, append=numbers.size)
            self._count(rank, numbers[starts], counts)

    def _count(self, rank: int, numbers: np.ndarray, counts: np.ndarray) -> None:
        if (rank, int(numbers[0])) == self._open:
            counts[0] += self._open_rows
        else:
            self.finish()
        self._open, self._open_rows = (rank, int(numbers[-1])), int(counts[-1])
        for index in np.flatnonzero(counts[:-1] > self._capacity).tolist():
            self._note(rank, int(numbers[index]), int(counts[index]))

    def finish(self) -> None:
        """No more keys follow."""
        if self._open_rows > self._capacity:
            self._note(*self._open, self._open_rows)
        self._open_rows = 0

    def _note(self, rank: int, bucket: int, rows: int) -> None:
        self.num_crowded += 1
        if len(self.crowded) < self._listed:
            self.crowded.append(
                f"{rows} rows belong to bucket {bucket} of rank {rank}, which has {self._capacity} slots: "
                "they cannot all have been in that table"
            )
