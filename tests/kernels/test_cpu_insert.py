"""Insertion, eviction and refusal on the CPU engine; sequences of operations are in test_cpu_sequences.py."""

from __future__ import annotations

import random

import pytest
import torch

from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.insert import Insertion, insert
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import KeyStatus, Scores, UniqueKeys
from dynamicemb.options import BUCKET_CAPACITIES
from tests import oracle, tolerances
from tests.kernels.keys import STRUCTURED_KEYS, chi_square_sigmas
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import PairedGroup, distinct, int64

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
LAYOUT = RowLayout(4, torch.float32, OptimizerKind.SGD)
FOUND, INSERTED, REPLACED, REFUSED = KeyStatus


def one_bucket(capacity: int, scores: list[int]) -> tuple[GroupMemory, list[int]]:
    """A table of one bucket whose first slots hold keys with these scores; and those keys, by slot."""
    memory = GroupMemory([TableGeometry.create(capacity, capacity, capacity)], LAYOUT)
    keys = list(range(1000, 1000 + len(scores)))
    memory.load(0, {slot: (oracle.digest(key), key, score) for slot, (key, score) in enumerate(zip(keys, scores))})
    return memory, keys


def insert_keys(memory: GroupMemory, keys: list[int], score: int = 0) -> tuple[UniqueKeys, torch.Tensor, Insertion]:
    unique = distinct(keys)
    slots = find(memory.view, unique)
    return unique, slots, insert(memory.view, unique, slots, Scores(int64([score] * len(keys))))


def in_order(keys: list[int]) -> list[int]:
    return sorted(keys, key=oracle.mix64)


@pytest.mark.parametrize("capacity", BUCKET_CAPACITIES)
@pytest.mark.parametrize("extra", [-10_000, -1, 0, 1, 50])
def test_a_bucket_fills_from_slot_0_and_refuses_the_rest(capacity: int, extra: int) -> None:
    size = max(capacity + extra, 1)
    memory, _ = one_bucket(capacity, [])
    keys = in_order(list(range(size)))
    unique, slots, insertion = insert_keys(memory, keys, score=5)
    placed = min(size, capacity)
    assert unique.keys.tolist() == keys
    assert slots.tolist() == list(range(placed)) + [-1] * (size - placed)
    assert insertion.status.dtype == torch.int8
    assert insertion.status.tolist() == [INSERTED] * placed + [REFUSED] * (size - placed)
    assert memory.occupied(0) == {slot: (oracle.digest(key), key, 5) for slot, key in enumerate(keys[:placed])}


def test_an_empty_batch() -> None:
    memory, _ = one_bucket(8, [1, 2])
    before = memory.snapshot()
    _, slots, insertion = insert_keys(memory, [])
    assert slots.shape == insertion.status.shape == insertion.evicted_keys.shape == (0,)
    assert not memory.changed_since(before)


@pytest.mark.parametrize(
    ("scores", "victims"),
    [
        ([7, 6, 5, 4, 3, 2, 1, 0], [7, 6, 5, 4, 3, 2, 1, 0]),
        ([1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([2, 1, 2, 1, 2, 1, 2, 1], [1, 3, 5, 7, 0, 2, 4, 6]),
        ([0, -1, 1, INT64_MIN, INT64_MAX, -(2**40), 2**40, 0], [3, 5, 1, 0, 7, 2, 6, 4]),
        ([INT64_MAX] * 4 + [INT64_MIN] * 4, [4, 5, 6, 7, 0, 1, 2, 3]),
        # Differences above bit 55, where a score packed with its slot into 64 bits would lose them.
        ([2**56 + 1, 2**56, 1, 0, 2**62, 2**55, 2**61, 2**60], [3, 2, 5, 1, 0, 7, 6, 4]),
    ],
)
@pytest.mark.parametrize("wanted", [1, 3, 8, 11])
def test_victims_go_in_order_of_score_then_slot(scores: list[int], victims: list[int], wanted: int) -> None:
    memory, old = one_bucket(8, scores)
    _, slots, insertion = insert_keys(memory, list(range(wanted)), score=INT64_MIN)
    count = min(wanted, 8)
    assert slots.tolist() == victims[:count] + [-1] * (wanted - count)
    assert insertion.status.tolist() == [REPLACED] * count + [REFUSED] * (wanted - count)
    assert insertion.evicted_keys[:count].tolist() == [old[slot] for slot in victims[:count]]
    assert insertion.evicted_scores[:count].tolist() == [scores[slot] for slot in victims[:count]]


def test_empty_slots_come_before_victims() -> None:
    memory, old = one_bucket(8, [5] * 8)
    memory.load(0, {2: (0, old[2], 5), 6: (0, old[6], 5)})
    _, slots, insertion = insert_keys(memory, list(range(4)), score=9)
    assert slots.tolist() == [2, 6, 0, 1]
    assert insertion.status.tolist() == [INSERTED, INSERTED, REPLACED, REPLACED]


@pytest.mark.parametrize("capacity", [8, 32, 256])
def test_keys_of_the_batch_are_never_evicted(capacity: int) -> None:
    # The keys of the batch have the least scores, and every absent key would like their slots.
    memory, old = one_bucket(capacity, list(range(capacity)))
    kept = old[: capacity // 2]
    keys = in_order(kept + list(range(capacity)))
    _, slots, insertion = insert_keys(memory, keys, score=-100)
    status = dict(zip(keys, insertion.status.tolist()))
    assert all(status[key] == FOUND for key in kept)
    placed = [key for key in keys if status[key] == REPLACED]
    assert len(placed) == capacity - capacity // 2
    assert [key for key in keys if key not in kept][: len(placed)] == placed
    assert set(slots.tolist()) == {-1, *range(capacity)}
    assert sorted(key for _, key, _ in memory.occupied(0).values()) == sorted(kept + placed)


def test_a_batch_of_found_keys_changes_nothing() -> None:
    memory, old = one_bucket(16, [3] * 16)
    before = memory.snapshot()
    _, slots, insertion = insert_keys(memory, old, score=8)
    assert insertion.status.tolist() == [FOUND] * 16
    assert sorted(slots.tolist()) == list(range(16))
    assert not memory.changed_since(before)


def test_a_refusal_changes_nothing() -> None:
    memory, old = one_bucket(8, [3] * 8)
    before = memory.snapshot()
    _, slots, insertion = insert_keys(memory, [*old, 1, 2], score=8)
    assert sorted(insertion.status.tolist()) == [FOUND] * 8 + [REFUSED] * 2
    assert sorted(slots.tolist()) == [-1, -1, *range(8)]
    assert not memory.changed_since(before)


def test_the_evicted_row_stays_until_it_is_overwritten() -> None:
    memory, _ = one_bucket(8, [5, 4, 3, 2, 1, 0, 6, 7])
    rows = torch.arange(32.0).reshape(8, 4)
    memory.write(int64(range(8)), rows, torch.empty(8, 0))
    _, slots, _ = insert_keys(memory, [1, 2])
    assert torch.equal(gather(memory.view, slots, int64([0, 1])), rows[[5, 4]])


@pytest.mark.parametrize("world_size", [1, 3])
def test_neighbouring_tables_and_buckets_do_not_mix(world_size: int) -> None:
    # The last bucket of each table is followed by the first of the next in the order of the batch.
    group = PairedGroup([(8, 8), (24, 24), (8, 8)], 8, world_size=world_size, rank=world_size - 1)
    generator = random.Random(6)
    for _ in range(5):
        keys = group.owned([oracle.signed(generator.getrandbits(64)) for _ in range(150)])
        group.train(keys, [generator.randrange(3) for _ in keys])
    assert min(group.counts[status] for status in (oracle.INSERTED, oracle.REPLACED, oracle.REFUSED)) > 0


@pytest.mark.parametrize("seed", range(3))
def test_long_batches_are_the_same_in_two_threads(seed: int, two_threads: None) -> None:
    # About 200 keys for each of 50 buckets of 128 slots: wherever the work is cut, the cut lies inside a bucket.
    group = PairedGroup([(50 * 128, 50 * 128)], 128)
    generator = random.Random(seed)
    for size in (9000, 5000, 12_000):
        keys = [generator.randrange(20_000) for _ in range(size)]
        group.train(keys, [0] * size)
    assert min(group.counts.values()) > 0


def test_a_bucket_longer_than_a_threads_share(two_threads: None) -> None:
    group = PairedGroup([(8, 8)], 8)
    for first in (0, 5000, 3000):
        group.train(list(range(first, first + 9000)), [0] * 9000)


@pytest.mark.parametrize("name", STRUCTURED_KEYS)
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 0), (3, 2)])
def test_buckets_and_digests_are_balanced(name: str, world_size: int, rank: int) -> None:
    keys = STRUCTURED_KEYS[name]
    keys = keys[torch.tensor([oracle.owner(key, world_size) == rank for key in keys[:60_000].tolist()]).nonzero()[:, 0]]
    buckets = 400  # of 256 slots: none of them overflows
    memory = GroupMemory([TableGeometry.create(buckets * 256, buckets * 256, 256)], LAYOUT, world_size)
    unique = distinct(keys.tolist(), world_size=world_size)
    slots = find(memory.view, unique)
    insertion = insert(memory.view, unique, slots, Scores(torch.zeros_like(slots)))
    assert insertion.status.tolist() == [INSERTED] * len(keys)
    per_bucket = torch.bincount(slots // 256, minlength=buckets)
    per_digest = torch.bincount(memory.chunks[0][0].digests.long(), minlength=256)[1:]
    assert abs(chi_square_sigmas(per_bucket)) < tolerances.CHI_SQUARE_SIGMAS
    assert abs(chi_square_sigmas(per_digest)) < tolerances.CHI_SQUARE_SIGMAS
