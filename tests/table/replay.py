"""What a group of tables must do, in dictionaries: the oracle's tables and the values of their rows.

The first value of a row is ``key mod 100000``; the optimizer is SGD with learning rate 1 and gradients are whole
numbers, so that every value is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamicemb import DynamicEmbEvictStrategy
from tests import oracle


@dataclass(frozen=True)
class Size:
    """Rows at most and at first, and the load above which a table grows that may."""

    max_rows: int
    init_rows: int
    max_load_factor: float


@dataclass(frozen=True)
class Pending:
    """A training lookup whose gradients have not come yet: (table, key) by place, and which of them were refused."""

    entries: list[tuple[int, int]]
    refused: set[tuple[int, int]]


class GroupReplay:
    """Tables of one group on the only rank."""

    def __init__(self, strategy: DynamicEmbEvictStrategy, bucket_capacity: int, sizes: Sequence[Size]) -> None:
        self.strategy = strategy
        self.sizes = list(sizes)
        self.tables = [
            oracle.TableModel(size.max_rows, size.init_rows, bucket_capacity, index=index)
            for index, size in enumerate(sizes)
        ]
        self.value_of: dict[tuple[int, int], float] = {}
        self.clock = 0
        self.custom_scores = [0] * len(sizes)
        #: hits, misses, evicted, refused by table.
        self.counts = [[0, 0, 0, 0] for _ in sizes]

    def train(self, entries: Sequence[tuple[int, int]], counts: Sequence[int]) -> tuple[list[float], Pending]:
        """A training lookup of (table, key), each standing for so many occurrences: rows by place, and the rest."""
        self.clock += 1
        occurrences: dict[tuple[int, int], int] = {}
        for entry, count in zip(entries, counts):
            occurrences[entry] = occurrences.get(entry, 0) + count
        for index in range(len(self.tables)):
            self._train_table(index, {key: count for (table, key), count in occurrences.items() if table == index})
        pending = Pending(list(entries), {entry for entry in occurrences if entry not in self.value_of})
        return self.read(entries), pending

    def _train_table(self, index: int, occurrences: dict[int, int]) -> None:
        table, size, counts = self.tables[index], self.sizes[index], self.counts[index]
        keys = sorted(occurrences, key=oracle.mix64)
        wanted = len(table.place_of) + sum(key not in table.place_of for key in keys)
        while table.can_grow and wanted > size.max_load_factor * table.capacity:
            table.grow()
        scores = [self._score(index, occurrences[key]) for key in keys]
        found = table.find(keys, scores, self.strategy is DynamicEmbEvictStrategy.LFU)
        counts[0] += sum(slot != -1 for slot in found)
        counts[1] += sum(slot == -1 for slot in found)
        for key, outcome in zip(keys, table.insert(keys, scores)):
            if outcome.status == oracle.REPLACED:
                assert outcome.evicted_key is not None
                del self.value_of[index, outcome.evicted_key]
                counts[2] += 1
            if outcome.status in (oracle.INSERTED, oracle.REPLACED):
                self.value_of[index, key] = float(key % 100_000)
            counts[3] += outcome.status == oracle.REFUSED

    def _score(self, index: int, occurrences: int) -> int:
        if self.strategy is DynamicEmbEvictStrategy.LFU:
            return occurrences
        return self.clock if self.strategy is DynamicEmbEvictStrategy.LRU else self.custom_scores[index]

    def update(self, pending: Pending, steps: Sequence[int]) -> None:
        """Adds ``steps`` to the rows of a lookup, place by place, where they still are; never to those refused then."""
        for entry, step in zip(pending.entries, steps):
            if entry in self.value_of and entry not in pending.refused:
                self.value_of[entry] += step

    def read(self, entries: Sequence[tuple[int, int]]) -> list[float]:
        """The value of every column; zero for keys that are not there."""
        return [self.value_of.get(entry, 0.0) for entry in entries]
