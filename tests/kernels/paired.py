"""An engine and the dictionary model driven through the same steps, and compared after each: outputs and raw memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.fill import fill
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.update import update
from dynamicemb.kernels.views import InitializerView, Scores, ScoreSource, UniqueKeys
from tests import oracle, oracle_values
from tests.kernels.memory import GroupMemory

# lr * g is exact, so a step in float32 has one rounding, with or without a fused multiply-add.
LEARNING_RATE = 0.5


def int64(values: Sequence[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def int32(values: Sequence[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def distinct(keys: Sequence[int], tables: Optional[Sequence[int]] = None, world_size: int = 1) -> UniqueKeys:
    """The engine's view of a batch, for tests that start after dedup."""
    tables = [0] * len(keys) if tables is None else tables
    return dedup(int64(keys), int32(tables), max(tables, default=0) + 1, world_size)


class PairedGroup:
    """A group of tables of one rank, twice. Every method asserts that both agree, and that the raw memory does.

    ``sizes`` holds (max rows, rows at first) for each table; ``policy`` is "lru", "lfu" or "customized".
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        bucket_capacity: int,
        policy: str = "lru",
        world_size: int = 1,
        rank: int = 0,
        device: str = "cpu",
    ) -> None:
        self.models = [
            oracle.TableModel(most, first, bucket_capacity, world_size, rank, index)
            for index, (most, first) in enumerate(sizes)
        ]
        geometries = [TableGeometry(model.max_buckets, model.shift, 0, bucket_capacity) for model in self.models]
        self.memory = GroupMemory(geometries, RowLayout(4, torch.float32, OptimizerKind.SGD), world_size, device)
        self.policy, self.world_size, self.rank, self.device = policy, world_size, rank, device
        self.clock = 0
        self.rows: list[dict[int, np.ndarray]] = [{} for _ in sizes]
        count = len(sizes)
        self.seeds = [oracle.signed(oracle.mix64(1000 + index)) for index in range(count)]
        self.init = InitializerView(
            int64(self.seeds, device),
            torch.full((count,), oracle_values.UNIFORM, dtype=torch.int32, device=device),
            torch.tensor([[-1.0, 1.0, 0.0, 0.0]] * count, dtype=torch.float64, device=device),
            torch.zeros(count, device=device),
            any_normal=False,
        )
        self.counts = dict.fromkeys(range(4), 0)

    def owned(self, keys: Sequence[int]) -> list[int]:
        """Those of ``keys`` that this rank holds."""
        return [key for key in keys if oracle.owner(key, self.world_size) == self.rank]

    def train(self, keys: Sequence[int], tables: Sequence[int], scores: Optional[Sequence[int]] = None) -> None:
        """A training lookup and an update: dedup, find + touch, insert, fill, gather, update.

        ``scores`` belong to the distinct keys in order, for "customized" (repeated as often as needed).
        """
        self.clock += 1
        wanted, unique = self._dedup(keys, tables)
        count = len(wanted.keys)
        given = self._scores(wanted, unique, scores)
        device_scores = torch.zeros(len(unique.keys), dtype=torch.int64, device=self.device)
        device_scores[:count] = int64(given, self.device)
        taken = self._as_taken(unique, device_scores)
        status = torch.full((len(unique.keys),), -1, dtype=torch.int8, device=self.device)
        slots = find(self.memory.view, unique, taken, self.policy == "lfu", status)
        assert slots[:count].tolist() == self._model_find(wanted, given)
        insertion = insert(self.memory.view, unique, slots, taken, status)
        outcomes = self._model_insert(wanted, given)
        assert insertion.status[:count].tolist() == [outcome.status for outcome in outcomes]
        assert slots[:count].tolist() == [outcome.slot for outcome in outcomes]
        replaced = [entry for entry, outcome in enumerate(outcomes) if outcome.status == oracle.REPLACED]
        picked = int64(replaced, self.device)
        assert insertion.evicted_keys[picked].tolist() == [outcomes[entry].evicted_key for entry in replaced]
        assert insertion.evicted_scores[picked].tolist() == [outcomes[entry].evicted_score for entry in replaced]
        fill(self.memory.view, unique, slots, insertion.status, self.init)
        self._model_fill(wanted, outcomes)
        self.compare_memory()
        self._compare_rows(wanted, unique, slots)
        self._update(wanted, unique, slots)

    def evaluate(self, keys: Sequence[int], tables: Sequence[int]) -> None:
        """A lookup that changes nothing."""
        wanted, unique = self._dedup(keys, tables)
        slots = find(self.memory.view, unique)
        expected = [self.models[table].slot(key) for table, key in zip(wanted.tables, wanted.keys)]
        assert slots[: len(expected)].tolist() == expected
        self.compare_memory()
        self._compare_rows(wanted, unique, slots)

    def grow(self, table: int) -> bool:
        """Doubles a table if it may; returns whether it did."""
        assert self.memory.geometries[table].can_grow == self.models[table].can_grow
        if not self.models[table].can_grow:
            return False
        self.memory.grow(table)
        self.models[table].grow()
        self.compare_memory()
        keys = list(self.rows[table])
        self.evaluate(keys, [table] * len(keys))
        return True

    def compare_memory(self) -> None:
        """Digest, key and score of every occupied slot, and no slot occupied beyond those."""
        for table, model in enumerate(self.models):
            assert self.memory.occupied(table) == model.occupied()
            assert len(model.place_of) <= model.capacity == self.memory.geometries[table].slots

    def _dedup(self, keys: Sequence[int], tables: Sequence[int]) -> tuple[oracle.Distinct, UniqueKeys]:
        wanted = oracle.dedup(keys, tables, self.world_size)
        unique = dedup(int64(keys, self.device), int32(tables, self.device), len(self.models), self.world_size)
        count = len(wanted.keys)
        assert unique.count.tolist() == [count]
        assert unique.keys[:count].tolist() == wanted.keys
        assert unique.tables[:count].tolist() == wanted.tables
        assert unique.inverse.tolist() == wanted.inverse
        assert unique.order.tolist() == wanted.order
        assert unique.offsets[: count + 1].tolist() == wanted.offsets
        return wanted, unique

    def _scores(self, wanted: oracle.Distinct, unique: UniqueKeys, scores: Optional[Sequence[int]]) -> list[int]:
        count = len(wanted.keys)
        if self.policy == "lru":
            return [self.clock] * count
        if self.policy == "customized":
            assert scores
            return [scores[entry % len(scores)] for entry in range(count)]
        occurrences = [end - begin for begin, end in zip(wanted.offsets, wanted.offsets[1:])]
        ones = torch.ones(len(wanted.inverse), dtype=torch.int64, device=self.device)
        assert segment_sum(ones, unique)[:count].tolist() == occurrences
        return occurrences

    def _as_taken(self, unique: UniqueKeys, scores: torch.Tensor) -> Scores:
        """int64 [U] scores of the entries, from where a lookup reads them."""
        tables = len(self.models)
        if self.policy == "lru":
            before = torch.full((tables,), self.clock - 1, dtype=torch.int64, device=self.device)
            return Scores(before, ScoreSource.NEXT)
        return Scores(unique.offsets, ScoreSource.DIFFERENCE) if self.policy == "lfu" else Scores(scores)

    def _entries(self, wanted: oracle.Distinct, table: int) -> list[int]:
        return [entry for entry, other in enumerate(wanted.tables) if other == table]

    def _model_find(self, wanted: oracle.Distinct, scores: Sequence[int]) -> list[int]:
        slots = [0] * len(wanted.keys)
        for table, model in enumerate(self.models):
            entries = self._entries(wanted, table)
            found = model.find(
                [wanted.keys[e] for e in entries], [scores[e] for e in entries], accumulate=self.policy == "lfu"
            )
            for entry, slot in zip(entries, found):
                slots[entry] = slot
        return slots

    def _model_insert(self, wanted: oracle.Distinct, scores: Sequence[int]) -> list[oracle.Outcome]:
        outcomes: dict[int, oracle.Outcome] = {}
        for table, model in enumerate(self.models):
            entries = self._entries(wanted, table)
            placed = model.insert([wanted.keys[e] for e in entries], [scores[e] for e in entries])
            outcomes.update(zip(entries, placed))
        for outcome in outcomes.values():
            self.counts[outcome.status] += 1
        return [outcomes[entry] for entry in range(len(wanted.keys))]

    def _model_fill(self, wanted: oracle.Distinct, outcomes: Sequence[oracle.Outcome]) -> None:
        for table, rows in enumerate(self.rows):
            entries = self._entries(wanted, table)
            for entry in entries:
                evicted = outcomes[entry].evicted_key
                if evicted is not None:
                    del rows[evicted]
            new = [wanted.keys[e] for e in entries if outcomes[e].status in (oracle.INSERTED, oracle.REPLACED)]
            if new:
                values = oracle_values.first_values(
                    new, self.seeds[table], oracle_values.UNIFORM, (-1.0, 1.0, 0.0, 0.0), 4
                )
                rows.update(zip(new, values))

    def _compare_rows(self, wanted: oracle.Distinct, unique: UniqueKeys, slots: torch.Tensor) -> None:
        absent = np.zeros(4, np.float32)
        of_entry = [self.rows[table].get(key, absent) for table, key in zip(wanted.tables, wanted.keys)]
        expected = np.stack(of_entry)[wanted.inverse] if of_entry else np.zeros((0, 4), np.float32)
        actual = gather(self.memory.view, slots, unique.inverse).cpu().numpy()
        np.testing.assert_array_equal(actual, expected)

    def _update(self, wanted: oracle.Distinct, unique: UniqueKeys, slots: torch.Tensor) -> None:
        """One SGD step with gradients of small whole numbers, which float32 sums exactly."""
        batch, tables = len(wanted.inverse), len(self.models)
        gradients = ((np.arange(batch * 4).reshape(batch, 4) + self.clock) % 7 - 3).astype(np.float32)
        hyperparameters = torch.zeros(tables, 5, dtype=torch.float64, device=self.device)
        hyperparameters[:, 0] = LEARNING_RATE
        steps = torch.full((tables,), self.clock - 1, dtype=torch.int64, device=self.device)
        update(self.memory.view, unique, slots, torch.from_numpy(gradients).to(self.device), hyperparameters, steps)
        assert steps.tolist() == [self.clock] * tables
        sums = np.zeros((len(wanted.keys), 4), np.float32)
        np.add.at(sums, wanted.inverse, gradients)
        for entry, (table, key) in enumerate(zip(wanted.tables, wanted.keys)):
            if key in self.rows[table]:
                self.rows[table][key] = self.rows[table][key] - np.float32(LEARNING_RATE) * sums[entry]
        self._compare_rows(wanted, unique, slots)
