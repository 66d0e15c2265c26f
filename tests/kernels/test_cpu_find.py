"""Finding and touching on the CPU engine. Tables are written by hand, so that nothing here depends on insertion."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from dynamicemb.kernels.find import find
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import Scores
from dynamicemb.options import BUCKET_CAPACITIES
from tests import oracle
from tests.kernels.keys import EXTREME_KEYS, key_pool, random_key
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import distinct, int64

LAYOUT = RowLayout(4, torch.float32, OptimizerKind.SGD)


def group(models: Sequence[oracle.TableModel]) -> GroupMemory:
    """The memory of these models, as it would be after the same growth."""
    geometries = [
        TableGeometry(model.max_buckets, model.shift, model.levels, model.bucket_capacity) for model in models
    ]
    memory = GroupMemory(geometries, LAYOUT, models[0].world_size)
    for table, model in enumerate(models):
        memory.load(table, model.occupied())
    return memory


def filled_model(capacity: int, max_buckets: int, growths: int, keys: list[int], **kwargs: int) -> oracle.TableModel:
    model = oracle.TableModel(max_buckets * capacity, capacity, capacity, **kwargs)
    for _ in range(growths):
        model.grow()
    model.insert(keys, list(range(100, 100 + len(keys))))
    return model


def assert_found(memory: GroupMemory, model: oracle.TableModel, keys: list[int], table: int = 0) -> None:
    unique = distinct(keys, [table] * len(keys), model.world_size)
    assert find(memory.view, unique).tolist() == [model.slot(key) for key in unique.keys.tolist()]


@pytest.mark.parametrize("capacity", BUCKET_CAPACITIES)
@pytest.mark.parametrize(("max_buckets", "growths"), [(1, 0), (8, 0), (8, 3), (13, 2), (13, 4)])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 1)])
def test_keys_are_where_the_model_says(
    capacity: int, max_buckets: int, growths: int, world_size: int, rank: int
) -> None:
    pool = key_pool(random.Random(capacity), capacity * 16, rank, world_size, colliding=capacity)
    model = filled_model(capacity, max_buckets, growths, pool[::2], world_size=world_size, rank=rank)
    memory = group([model])
    before = memory.snapshot()
    assert_found(memory, model, pool)
    assert not memory.changed_since(before)


@pytest.mark.parametrize("capacity", BUCKET_CAPACITIES)
def test_keys_of_one_digest_are_told_apart(capacity: int) -> None:
    keys = oracle.colliding_keys(0, 1, 0.5, 1234, capacity + 5)
    model = filled_model(capacity, 4, 2, keys[:capacity])
    assert len(model.place_of) == capacity
    memory = group([model])
    assert_found(memory, model, keys)
    assert find(memory.view, distinct(keys[capacity:])).tolist() == [-1] * 5


@pytest.mark.parametrize("capacity", BUCKET_CAPACITIES)
def test_every_slot_of_a_bucket_is_searched(capacity: int) -> None:
    key = oracle.colliding_keys(0, 1, 0.5, 99, 1)[0]
    for slot in range(capacity):
        model = filled_model(capacity, 4, 2, [])
        memory = group([model])
        handle = model.handle(model.bucket(key), slot)
        memory.load(0, {handle: (oracle.digest(key), key, 0)})
        assert find(memory.view, distinct([key])).tolist() == [handle]


def test_an_empty_table_has_no_keys() -> None:
    model = filled_model(8, 4, 0, [])
    assert find(group([model]).view, distinct(list(EXTREME_KEYS))).tolist() == [-1] * len(EXTREME_KEYS)


def test_an_empty_batch() -> None:
    slots = find(group([filled_model(8, 4, 0, [1])]).view, distinct([]), Scores(int64([])))
    assert slots.shape == (0,) and slots.dtype == torch.int64


def test_a_key_that_was_left_in_an_emptied_slot_is_absent() -> None:
    model = filled_model(8, 4, 1, [])
    memory = group([model])
    for key in (0, -1, 12345):
        memory.load(0, {model.handle(model.bucket(key), 3): (0, key, 7)})
        assert find(memory.view, distinct([key])).tolist() == [-1]


def test_a_key_in_another_bucket_or_table_is_absent() -> None:
    models = [filled_model(8, 4, 2, []) for _ in range(2)]
    models[1].index = 1
    memory = group(models)
    key = 4242
    bucket = models[0].bucket(key)
    for table in range(2):
        for other in range(4):
            if (table, other) != (0, bucket):
                memory.load(table, {models[table].handle(other, 2): (oracle.digest(key), key, 0)})
    assert find(memory.view, distinct([key])).tolist() == [-1]


def test_tables_of_a_group_are_separate() -> None:
    generator = random.Random(8)
    keys = [random_key(generator) for _ in range(120)]
    models = [filled_model(16, 1 + 3 * table, table % 2, keys[table::3], index=table) for table in range(3)]
    memory = group(models)
    unique = distinct(keys * 3, [table for table in range(3) for _ in keys])
    expected = [models[table].slot(key) for table, key in zip(unique.tables.tolist(), unique.keys.tolist())]
    assert find(memory.view, unique).tolist() == expected


@pytest.mark.parametrize("accumulate", [False, True])
def test_touching(accumulate: bool) -> None:
    generator = random.Random(9)
    keys = [random_key(generator) for _ in range(80)]
    model = filled_model(16, 4, 2, keys[:40])
    memory = group([model])
    unique = distinct(keys[20:])
    scores = [generator.choice([1, 5, 2**40, -3]) for _ in range(60)]
    slots = find(memory.view, unique, Scores(int64(scores)), accumulate)
    assert slots.tolist() == model.find(unique.keys.tolist(), scores, accumulate)
    assert memory.occupied(0) == model.occupied()
    assert any(score in scores for _, _, score in model.occupied().values()) is not accumulate


def test_touching_absent_keys_changes_nothing() -> None:
    memory = group([filled_model(8, 4, 2, list(range(20)))])
    before = memory.snapshot()
    find(memory.view, distinct(list(range(100, 150))), Scores(int64([9] * 50)))
    assert not memory.changed_since(before)


@pytest.mark.parametrize("score", [-(2**63), -1, 0, 2**63 - 1])
def test_any_score_can_be_given(score: int) -> None:
    memory = group([filled_model(8, 1, 0, [77])])
    find(memory.view, distinct([77]), Scores(int64([score])))
    assert memory.occupied(0) == {0: (oracle.digest(77), 77, score)}


def test_a_long_batch_in_two_threads(two_threads: None) -> None:
    keys = list(range(-10_000, 10_000))
    model = filled_model(64, 400, 3, keys[::2])
    memory = group([model])
    unique = distinct(keys)
    scores = list(range(len(keys)))
    assert find(memory.view, unique, Scores(int64(scores))).tolist() == model.find(unique.keys.tolist(), scores)
    assert memory.occupied(0) == model.occupied()
