"""What a sharded table must do, in dictionaries: the oracle's tables of all ranks, and the rows in them.

Every place of a batch has a gradient of -1 after torchrec's division, and the optimizer is SGD with learning rate 1, so
that a row is its first value plus the number of times that its id has been trained on since it was inserted: exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamicemb import DynamicEmbEvictStrategy
from tests import oracle

#: DynamicEmbInitializerMode.DEBUG, see :func:`first_value`.
DEBUG_MODULUS = 100_000


def first_value(key: int) -> float:
    return float(key % DEBUG_MODULUS)


class Replay:
    """One table over all ranks.

    Args:
        index: place of the table among those that share its group.
        strategy: meaning of scores.
        max_rows, init_rows: on each rank.
        max_load_factor: load above which a table grows that may.
    """

    def __init__(
        self,
        world_size: int,
        index: int,
        strategy: DynamicEmbEvictStrategy,
        bucket_capacity: int,
        max_rows: int,
        init_rows: int,
        max_load_factor: float,
    ) -> None:
        self.strategy = strategy
        self.max_load_factor = max_load_factor
        self.tables = [
            oracle.TableModel(max_rows, init_rows, bucket_capacity, world_size, rank, index)
            for rank in range(world_size)
        ]
        self.value_of: dict[int, float] = {}
        self.clock = 0
        self.custom_score = 0
        self.hits = self.misses = self.evicted = self.refused = 0

    @property
    def size(self) -> int:
        return sum(len(table.place_of) for table in self.tables)

    @property
    def slots(self) -> int:
        return sum(table.capacity for table in self.tables)

    def train(self, ids_by_rank: Sequence[Sequence[int]]) -> list[list[float]]:
        """A training step; returns what each rank reads in its forward pass."""
        self.clock += 1
        ids = [key for rank_ids in ids_by_rank for key in rank_ids]
        occurrences = {key: ids.count(key) for key in set(ids)}
        for table in self.tables:
            self._train_on_owner(table, {key: count for key, count in occurrences.items() if self._owns(table, key)})
        output = [self.read(rank_ids) for rank_ids in ids_by_rank]
        for key, count in occurrences.items():
            if key in self.value_of:
                self.value_of[key] += count
        return output

    def _owns(self, table: oracle.TableModel, key: int) -> bool:
        return oracle.owner(key, table.world_size) == table.rank

    def _train_on_owner(self, table: oracle.TableModel, occurrences: dict[int, int]) -> None:
        keys = sorted(occurrences, key=oracle.mix64)
        while table.can_grow and self._rows_wanted(table, keys) > self.max_load_factor * table.capacity:
            table.grow()
        scores = [self._score(occurrences[key]) for key in keys]
        found = table.find(keys, scores, self.strategy is DynamicEmbEvictStrategy.LFU)
        self.hits += sum(slot != -1 for slot in found)
        self.misses += sum(slot == -1 for slot in found)
        for key, outcome in zip(keys, table.insert(keys, scores)):
            if outcome.status == oracle.REPLACED:
                assert outcome.evicted_key is not None
                del self.value_of[outcome.evicted_key]
                self.evicted += 1
            if outcome.status in (oracle.INSERTED, oracle.REPLACED):
                self.value_of[key] = first_value(key)
            self.refused += outcome.status == oracle.REFUSED

    def _rows_wanted(self, table: oracle.TableModel, keys: Sequence[int]) -> int:
        return len(table.place_of) + sum(key not in table.place_of for key in keys)

    def _score(self, occurrences: int) -> int:
        if self.strategy is DynamicEmbEvictStrategy.LFU:
            return occurrences
        return self.clock if self.strategy is DynamicEmbEvictStrategy.LRU else self.custom_score

    def read(self, ids: Sequence[int]) -> list[float]:
        """The value of every column of these ids' rows; zero for those that are not there."""
        return [self.value_of.get(key, 0.0) for key in ids]
