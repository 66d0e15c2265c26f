"""Batches for a case: keys never seen, keys that come back, crowds in one bucket, one key that is most of a batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.kernels.hashing import owners
from tests.gpu.cases import Case
from tests.kernels.keys import EXTREME_KEYS
from tests.oracle import colliding_keys

__all__ = ["Batch", "Feed"]

#: Odd, so that multiples of it modulo 2**64 are distinct; small numbers become keys of any size and both signs.
FACTOR = -7046029254386353131
#: Keys that a feed has for each row of the tables.
KEYS_PER_ROW = 1.5
#: Share of a batch that one key takes in :meth:`Feed.dominated`.
DOMINANT_SHARE = 0.6


@dataclass(frozen=True)
class Batch:
    """On the host: keys int64 [N], their tables int32 [N], and occurrences int64 [N] or None."""

    keys: torch.Tensor
    tables: torch.Tensor
    counts: Optional[torch.Tensor]

    def to(self, device: torch.device, copy: bool = False) -> Batch:
        return self._of_each(lambda part: part.to(device, copy=copy))

    def counted(self) -> Batch:
        """With one to five occurrences of each key."""
        return dataclasses.replace(self, counts=torch.arange(len(self.keys)) % 5 + 1)

    def permuted(self, order: torch.Tensor) -> Batch:
        return self._of_each(lambda part: part[order])

    def _of_each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        counts = None if self.counts is None else function(self.counts)
        return Batch(function(self.keys), function(self.tables), counts)


class Feed:
    """A stream of batches, the same for the same case. Each key is one of the case's rank, in one table."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._generator = torch.Generator().manual_seed(case.rows)
        self._pool = self._owned_keys(int(KEYS_PER_ROW * case.rows) + 8 * case.batch)
        sizes = torch.tensor([config.max_capacity for config in case.configs()], dtype=torch.float64)
        self._ends = sizes.cumsum(0) / sizes.sum()
        self._used = 0
        self._batches = 0

    def _owned_keys(self, count: int) -> torch.Tensor:
        """``count`` distinct keys of the rank, the extreme ones first."""
        rank, world_size = self._case.ranks
        numbers = torch.arange(int(count * world_size * 1.05) + 200 * world_size) + 1000
        keys = torch.cat([torch.tensor(EXTREME_KEYS), numbers * FACTOR])
        owned = keys[owners(keys, world_size) == rank]
        assert owned.numel() >= count
        return owned[:count].clone()

    # --------------------------------------------------------------------------------------- kinds of batches

    def filling(self, share: float) -> Iterator[Batch]:
        """New keys in every batch, as many in all as ``share`` of the rows."""
        for _ in range(-(-int(self._case.rows * share) // self._case.batch)):
            yield self.new()

    def new(self) -> Batch:
        """Keys that were in no batch before, once each."""
        first, self._used = self._used, self._used + self._case.batch
        return self._batch(torch.arange(first, self._used))

    def mixed(self) -> Batch:
        """Keys that were there, a few of them twice, and some that were not."""
        return self._batch((self._uniform() * min(1.25 * self._used, len(self._pool))).long())

    def skewed(self) -> Batch:
        """Few keys many times, many keys a few times."""
        return self._batch((self._uniform() ** 4 * self._used).long())

    def dominated(self) -> Batch:
        """One key makes up most of the batch."""
        others = (self._uniform() * self._used).long()
        return self._batch(torch.where(self._uniform() < DOMINANT_SHARE, 5, others))

    def crowded(self, number: int = 0) -> Batch:
        """More keys for a bucket of table 0 than it has slots, twice: with one digest, and with many; and others.
        Another ``number`` has other keys for the same two buckets: they evict all of these."""
        rank, world_size = self._case.ranks
        first, end = (2 * self._case.bucket_capacity * crowd for crowd in (number, number + 1))
        crowds = [colliding_keys(rank, world_size, place, bits, end) for place, bits in ((0.3, 12345), (0.8, None))]
        keys = torch.tensor(list(itertools.chain(*(crowd[first:] for crowd in crowds))))
        rest = self.skewed()
        tables = torch.zeros(len(keys), dtype=torch.int32)
        return self._finished(torch.cat([keys, rest.keys]), torch.cat([tables, rest.tables]))

    def half_absent(self) -> Batch:
        """For evaluation: keys that were in batches, and keys that will be in none."""
        places = (self._uniform() * self._used).long()
        places[::2] = len(self._pool) - 1 - places[::2] % self._case.batch
        return self._batch(places)

    def empty(self) -> Batch:
        return self._batch(torch.empty(0, dtype=torch.int64))

    # --------------------------------------------------------------------------------------- parts

    def _uniform(self) -> torch.Tensor:
        return torch.rand(self._case.batch, generator=self._generator, dtype=torch.float64)

    def _batch(self, places: torch.Tensor) -> Batch:
        """Places spread over the tables by their sizes: the same place is always the same table."""
        spread = (places * 40503 % 65536).double() / 65536
        return self._finished(self._pool[places], torch.searchsorted(self._ends, spread, right=True).int())

    def _finished(self, keys: torch.Tensor, tables: torch.Tensor) -> Batch:
        self._batches += 1
        counts = None
        if self._case.policy is DynamicEmbEvictStrategy.LFU and self._batches % 2:
            counts = torch.randint(1, 6, (len(keys),), generator=self._generator)
        return Batch(keys, tables, counts)
