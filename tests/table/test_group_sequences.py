"""Random sequences of what a group can be asked, against dictionaries: lookups, updates in any order, growth."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.config import TableConfig
from dynamicemb.table.group import TableCounters, TableGroup, TrainingLookup
from dynamicemb.table.optimizers import OptimizerConfig
from tests.exploring import examples
from tests.oracle import mix64, signed
from tests.table.replay import GroupReplay, Pending, Size

BUCKET, DIM = 8, 4
DEBUG = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.DEBUG)

sizes = st.sampled_from(
    [Size(8, 8, 0.5), Size(24, 24, 0.5), Size(40, 8, 0.75), Size(64, 8, 1.0), Size(90, 24, 0.25)]
)  # fmt: skip
entries = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 5)), max_size=60)
operations = st.one_of(
    st.tuples(st.just("train"), entries),
    st.tuples(st.just("train"), entries),
    st.tuples(st.just("update"), st.tuples(st.integers(0, 3), st.integers(-3, 3))),
    st.tuples(st.just("evaluate"), entries),
    st.tuples(st.just("score"), st.integers(-(2**63), 2**63 - 1)),
)


class Both:
    """A group and its model, driven side by side and compared after every operation."""

    def __init__(self, strategy: DynamicEmbEvictStrategy, table_sizes: list[Size]) -> None:
        optimizer = OptimizerConfig(kind=OptimizerKind.SGD, learning_rate=1.0)
        configs = [
            TableConfig(
                f"t{index}", DIM, size.max_rows, size.init_rows, bucket_capacity=BUCKET,
                max_load_factor=size.max_load_factor, evict_strategy=strategy, initializer=DEBUG, optimizer=optimizer,
            )
            for index, size in enumerate(table_sizes)
        ]  # fmt: skip
        self.group = TableGroup(configs, 1, torch.device("cpu"))
        self.model = GroupReplay(strategy, BUCKET, table_sizes)
        self.pending: list[tuple[TrainingLookup, Pending]] = []

    def arguments(self, batch: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int]], list[int], Any, Any, Any]:
        tables = [table % len(self.model.tables) for table, _, _ in batch]
        keys, counts = [signed(mix64(number)) for _, number, _ in batch], [count for _, _, count in batch]
        tensors = torch.tensor(keys, dtype=torch.int64), torch.tensor(tables, dtype=torch.int32)
        return list(zip(tables, keys)), counts, *tensors, torch.tensor(counts, dtype=torch.int64)

    def run(self, name: str, argument: Any) -> None:
        getattr(self, name)(argument)
        self.compare()

    def train(self, batch: list[tuple[int, int, int]]) -> None:
        pairs, counts, keys, tables, occurrences = self.arguments(batch)
        rows, lookup = self.group.train_lookup(keys, tables, occurrences)
        values, pending = self.model.train(pairs, counts)
        self.check_rows(rows, values)
        self.pending.append((lookup, pending))

    def update(self, argument: tuple[int, int]) -> None:
        which, factor = argument
        if which < len(self.pending):
            lookup, pending = self.pending.pop(which)
            steps = [factor * (place % 7 + 1) for place in range(len(pending.entries))]
            gradients = -torch.tensor(steps, dtype=torch.float32).view(-1, 1).expand(-1, DIM)
            self.group.apply_gradients(lookup, gradients)
            self.model.update(pending, steps)

    def evaluate(self, batch: list[tuple[int, int, int]]) -> None:
        pairs, _, keys, tables, _ = self.arguments(batch)
        self.check_rows(self.group.eval_lookup(keys, tables), self.model.read(pairs))

    def score(self, score: int) -> None:
        self.group.custom_scores[:] = score
        self.model.custom_scores = [score] * len(self.model.tables)

    def check_rows(self, rows: torch.Tensor, values: list[float]) -> None:
        assert rows.shape == (len(values), DIM)
        assert torch.equal(rows, torch.tensor(values).view(-1, 1).expand(-1, DIM))

    def compare(self) -> None:
        for index, (counters, table) in enumerate(zip(self.group.counters(), self.model.tables, strict=True)):
            assert counters == TableCounters(len(table.place_of), *self.model.counts[index])
            assert counters.size <= self.group.storage.geometries[index].max_slots
            assert self.group.storage.geometries[index].slots == table.capacity
            stored = self.group.stored_rows(index)
            assert stored.keys.tolist() == sorted(table.place_of, key=mix64), "in canonical order"
            found = zip(stored.slots.tolist(), stored.keys.tolist(), stored.scores.tolist(), strict=True)
            occupied = {slot: (key, score) for slot, (_, key, score) in table.occupied().items()}
            assert {slot: (key, score) for slot, key, score in found} == occupied
            self.check_rows(stored.embeddings, self.model.read([(index, key) for key in stored.keys.tolist()]))


@settings(max_examples=examples(300))
@given(
    strategy=st.sampled_from(list(DynamicEmbEvictStrategy)),
    table_sizes=st.lists(sizes, min_size=1, max_size=3),
    sequence=st.lists(operations, min_size=1, max_size=25),
)
def test_sequences(strategy: DynamicEmbEvictStrategy, table_sizes: list[Size], sequence: list[tuple[str, Any]]) -> None:
    both = Both(strategy, table_sizes)
    for name, argument in sequence:
        both.run(name, argument)
    while both.pending:
        both.run("update", (0, 1))
