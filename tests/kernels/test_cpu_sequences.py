"""Thousands of operations on the CPU engine and the dictionary model, compared after each; and a million keys."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.fill import FillMode, fill
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import InitializerView, KeyStatus, Scores, UniqueKeys
from tests import oracle
from tests.exploring import examples
from tests.kernels.first_rows import initial_rows
from tests.kernels.keys import key_pool
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import PairedGroup, int64

POLICIES = ("lru", "lfu", "customized")
SCORES = (0, 1, 1, 2, -1, 5, 2**31, 2**56 + 1, 2**56, -(2**63), 2**63 - 1)


def run_sequence(
    group: PairedGroup, pool: list[int], operations: int, longest_batch: int, generator: random.Random
) -> None:
    """Training with a drifting crowd of keys, evaluation, and growth at random moments."""
    tables = len(group.models)
    for number in range(operations):
        window = len(pool) // 2
        first = number * (len(pool) - window) // operations
        size = generator.choice([0, 1, generator.randrange(longest_batch), longest_batch])
        keys = [pool[first + int(window * generator.random() ** 2)] for _ in range(size)]
        chosen = [generator.randrange(tables) for _ in range(size)]
        action = generator.random()
        if action < 0.03:
            group.grow(generator.randrange(tables))
        elif action < 0.15:
            group.evaluate(keys, chosen)
        else:
            group.train(keys, chosen, [generator.choice(SCORES) for _ in range(11)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("capacity", "sizes", "world_size", "rank", "longest_batch", "operations"),
    [
        (8, [(8, 8)], 1, 0, 20, 500),
        (8, [(40, 8), (24, 24), (72, 10)], 1, 0, 60, 500),
        (8, [(104, 8), (16, 16)], 3, 1, 60, 400),
        (16, [(160, 30)], 3, 2, 80, 300),
        (64, [(256, 64), (64, 64)], 1, 0, 150, 120),
        (128, [(640, 100)], 3, 0, 300, 80),
        (256, [(512, 256)], 1, 0, 400, 60),
    ],
)
def test_random_operations(
    policy: str,
    capacity: int,
    sizes: list[tuple[int, int]],
    world_size: int,
    rank: int,
    longest_batch: int,
    operations: int,
) -> None:
    generator = random.Random(f"{policy} {capacity} {sizes}")
    group = PairedGroup(sizes, capacity, policy, world_size, rank)
    capacity_of_all = sum(most for most, _ in sizes)
    pool = key_pool(generator, 6 * capacity_of_all // len(sizes), rank, world_size, colliding=capacity)
    generator.shuffle(pool)
    run_sequence(group, pool, operations, longest_batch, generator)
    assert min(group.counts.values()) > 0, "the sequence misses a case: found, inserted, replaced, refused"


class TableMachine(RuleBasedStateMachine):
    """Sequences that hypothesis composes, and shrinks when they fail."""

    @initialize(
        capacity=st.sampled_from([8, 16]),
        sizes=st.lists(st.sampled_from([(8, 8), (24, 1), (56, 8)]), min_size=1, max_size=3),
        policy=st.sampled_from(POLICIES),
        world=st.sampled_from([(1, 0), (3, 0), (3, 2)]),
        seed=st.integers(0, 3),
    )
    def create(
        self, capacity: int, sizes: list[tuple[int, int]], policy: str, world: tuple[int, int], seed: int
    ) -> None:
        self.group = PairedGroup(sizes, capacity, policy, *world)
        world_size, rank = world
        self.pool = key_pool(random.Random(seed), 80, rank, world_size, colliding=12)

    def batch(self, picks: list[int]) -> tuple[list[int], list[int]]:
        return [self.pool[pick % 80] for pick in picks], [pick // 80 % len(self.group.models) for pick in picks]

    @rule(picks=st.lists(st.integers(0, 239), max_size=40), scores=st.lists(st.sampled_from(SCORES), min_size=1))
    def train(self, picks: list[int], scores: list[int]) -> None:
        self.group.train(*self.batch(picks), scores)

    @rule(first=st.integers(0, 60), size=st.integers(1, 20))
    def train_neighbours(self, first: int, size: int) -> None:
        self.group.train(*self.batch(list(range(first, first + size)) * 2), [size, first])

    @rule(picks=st.lists(st.integers(0, 239), max_size=40))
    def evaluate(self, picks: list[int]) -> None:
        self.group.evaluate(*self.batch(picks))

    @rule(table=st.integers(0, 2))
    def grow(self, table: int) -> None:
        self.group.grow(table % len(self.group.models))


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=examples(60), stateful_step_count=25)


def test_the_order_of_a_batch_does_not_matter() -> None:
    generator = random.Random(11)
    groups = [PairedGroup([(64, 8), (64, 64)], 8, "lfu") for _ in range(2)]
    for _ in range(30):
        pairs = [(generator.randrange(300), generator.randrange(2)) for _ in range(60)]
        for group in groups:
            group.train([key for key, _ in pairs], [table for _, table in pairs])
            generator.shuffle(pairs)
    assert [model.occupied() for model in groups[0].models] == [model.occupied() for model in groups[1].models]


def test_a_row_that_was_evicted_begins_anew() -> None:
    group = PairedGroup([(8, 8)], 8)
    for first in (0, 100, 0, 100, 0):
        group.train(list(range(first, first + 8)), [0] * 8)
    assert group.counts[oracle.REPLACED] == 32


def test_a_million_random_keys() -> None:
    count, capacity = 1_000_000, 128
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))
    keys[:5] = int64([-(2**63), -1, 0, 1, 2**63 - 1])
    assert keys.unique().numel() == count
    tables = torch.zeros(count, dtype=torch.int32)
    geometry = TableGeometry.create(4 * count, 2 * count, capacity)
    memory = GroupMemory([geometry], RowLayout(4, torch.float32, OptimizerKind.SGD))
    init = InitializerView(
        int64([-12345]),
        torch.tensor([FillMode.UNIFORM], dtype=torch.int32),
        torch.tensor([[-1.0, 1.0, 0.0, 0.0]], dtype=torch.float64),
        torch.zeros(1),
        any_normal=False,
    )

    def slots_of(unique: UniqueKeys) -> torch.Tensor:
        return find(memory.view, unique)

    def assert_all_there() -> torch.Tensor:
        unique = dedup(keys, tables, 1, 1)
        slots = slots_of(unique)
        assert slots.unique().numel() == count and int(slots.min()) >= 0
        assert torch.equal(gather(memory.view, slots, unique.inverse), expected)
        return slots

    for part in keys.split(100_000):
        unique = dedup(part, tables[: len(part)], 1, 1)
        slots = slots_of(unique)
        assert int(slots.max()) == -1
        insertion = insert(memory.view, unique, slots, Scores(torch.zeros_like(slots)))
        assert insertion.status.unique().tolist() == [KeyStatus.INSERTED]
        fill(memory.view, unique, slots, insertion.status, init)
    expected = initial_rows(keys, tables, init, 4, torch.float32)
    before = assert_all_there()
    memory.grow(0)
    after = assert_all_there()
    moved = after != before
    assert 0.49 < moved.double().mean() < 0.51
    strangers = dedup(keys[:100_000] ^ 0x5A5A5A5A5A5A, tables[:100_000], 1, 1)
    assert int(slots_of(strangers).max()) == -1
