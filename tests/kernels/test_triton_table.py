"""Find, insert, evict, gather and growth on the Triton engine: the bytes of the CPU engine after each operation."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import KeyStatus
from tests.kernels.group_state import Twins
from tests.kernels.keys import key_pool
from tests.kernels.triton_host import MARKS

pytestmark = MARKS

LAYOUT = RowLayout(4, torch.float32, OptimizerKind.SGD)
EXTREME_SCORES = torch.tensor([2**63 - 1, -(2**63), 0, 2**63 - 1, -1, 1])


def twins(capacity: int, sizes: Sequence[tuple[int, int]], world_size: int = 1) -> Twins:
    """``sizes``: (buckets at full size, buckets at first) of each table."""
    geometries = [TableGeometry.create(most * capacity, first * capacity, capacity) for most, first in sizes]
    return Twins(geometries, LAYOUT, world_size)


def one_table(keys: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(list(keys), dtype=torch.int64), torch.zeros(len(keys), dtype=torch.int32)


def statuses(status: torch.Tensor) -> list[int]:
    """How many keys were found, inserted, replaced, refused."""
    return torch.bincount(status.to(torch.int64), minlength=len(KeyStatus)).tolist()


@pytest.mark.parametrize(
    ("capacity", "sizes", "world_size", "rank"),
    [
        (8, [(7, 1), (4, 4), (1, 1)], 1, 0),
        (8, [(13, 1), (6, 2)], 3, 1),
        (16, [(8, 1), (3, 3)], 3, 2),
        (128, [(3, 1), (1, 1)], 1, 0),
    ],
)
def test_random_sequences(capacity: int, sizes: list[tuple[int, int]], world_size: int, rank: int) -> None:
    """Training, evaluation and growth in random order, with keys that come back, collide and take any 64 bits."""
    generator = random.Random(capacity + world_size)
    pair = twins(capacity, sizes, world_size)
    slots = sum(geometry.max_slots for geometry in pair.cpu.geometries)
    pool = key_pool(generator, slots + slots // 2, rank, world_size, colliding=capacity)
    seen = torch.zeros(len(KeyStatus), dtype=torch.int64)
    for clock in range(12):
        size = generator.randrange(1, 90)
        keys = torch.tensor(generator.choices(pool, k=size))
        tables = torch.tensor(generator.choices(range(len(sizes)), k=size), dtype=torch.int32)
        action = generator.random()
        if action < 0.15:
            pair.gather(pair.lookup(keys, tables))
        elif action < 0.3 and pair.cpu.geometries[clock % len(sizes)].can_grow:
            pair.grow(clock % len(sizes))
        else:
            scores = [torch.tensor([clock]), torch.tensor([3, 1, 1, 2]), EXTREME_SCORES][clock % 3]
            _, insertion = pair.train(keys, tables, scores, accumulate=clock % 3 == 1)
            seen += torch.tensor(statuses(insertion.status))
    assert (seen[: KeyStatus.REFUSED] > 0).all(), "the sequence does not test what it is for"


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 32, 33, 70])
def test_one_bucket_fills_up_and_refuses(size: int) -> None:
    """More keys than slots, up to more than a program looks at together."""
    pair = twins(8, [(1, 1)])
    _, insertion = pair.train(*one_table(range(size)), torch.tensor([5]))
    assert statuses(insertion.status) == [0, min(size, 8), 0, max(size - 8, 0)]


def test_keys_of_the_batch_are_not_evicted_by_it() -> None:
    pair = twins(8, [(1, 1)])
    pair.train(*one_table(range(8)), torch.tensor([1]))
    batch, insertion = pair.train(*one_table([*range(3, 8), *range(100, 140)]), torch.tensor([0]))
    assert statuses(insertion.status) == [5, 0, 3, 37]
    assert sorted(insertion.evicted_keys[insertion.status == KeyStatus.REPLACED].tolist()) == [0, 1, 2]
    assert (batch.cpu_slots >= 0).sum() == 8


@pytest.mark.parametrize("scores", [[4, 4, 4, 4], [-1, -2, 2**62, 0], [2**63 - 1, 2**63 - 1, -(2**63), 2**63 - 1]])
def test_victims_have_the_least_score_then_slot(scores: list[int]) -> None:
    """Scores use all 64 bits, the greatest included."""
    pair = twins(8, [(1, 1)])
    pair.train(*one_table(range(8)), torch.tensor(scores))
    for first in (10, 20):
        _, insertion = pair.train(*one_table(range(first, first + 3)), torch.tensor([7]))
        assert statuses(insertion.status) == [0, 0, 3, 0]


def test_scores_accumulate_modulo_two_to_the_64() -> None:
    pair = twins(8, [(2, 2)])
    for scores in ([2**63 - 1], [2**63 - 1], [3]):
        pair.train(*one_table(range(6)), torch.tensor(scores), accumulate=True)


@pytest.mark.parametrize("full", [5, 8, 13, 32])
def test_growth_to_any_size(full: int) -> None:
    """Doubling from one bucket, full ones included; every key is found after each step."""
    pair = twins(8, [(full, 1), (full, 1)], world_size=1)
    keys = key_pool(random.Random(full), 40, 0, 1, colliding=4)
    tables = torch.tensor([0, 1] * 20, dtype=torch.int32)
    while pair.cpu.geometries[1].can_grow:
        pair.train(torch.tensor(keys), tables, torch.tensor([1]))
        pair.grow(1)
        pair.gather(pair.lookup(torch.tensor(keys), tables))


@pytest.mark.parametrize("dim", [4, 12, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_width_are_read_and_moved(dim: int, dtype: torch.dtype) -> None:
    geometries = [TableGeometry.create(32, 8, 8)] * 2
    pair = Twins(geometries, RowLayout(dim, dtype, OptimizerKind.ADAM))
    tables = torch.tensor([0, 1] * 10, dtype=torch.int32)
    batch, _ = pair.train(torch.arange(20) // 3, tables, torch.tensor([1]))
    assert not pair.gather(batch).isnan().any()
    pair.grow(0)
    missing = pair.lookup(torch.arange(40, 60), tables)
    assert not pair.gather(missing).any()
