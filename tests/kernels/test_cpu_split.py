"""Doubling on the CPU engine: what moves, what stays, and that every key is found afterwards."""

from __future__ import annotations

import random

import pytest
import torch

from dynamicemb.kernels.find import find
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import KeyStatus, Scores
from dynamicemb.options import BUCKET_CAPACITIES
from tests import oracle
from tests.kernels.keys import key_pool
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import PairedGroup, distinct, int64


@pytest.mark.parametrize("max_buckets", [2, 3, 4, 5, 7, 8, 13, 32])
@pytest.mark.parametrize("capacity", [8, 64, 256])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 2)])
def test_growth_to_full_size(max_buckets: int, capacity: int, world_size: int, rank: int) -> None:
    group = PairedGroup([(max_buckets * capacity, 1)], capacity, world_size=world_size, rank=rank)
    pool = key_pool(random.Random(max_buckets), 4 * capacity, rank, world_size, colliding=capacity // 2)
    group.train(pool, [0] * len(pool))
    while group.grow(0):
        group.train(pool[::3], [0] * len(pool[::3]))
    assert group.models[0].buckets == max_buckets


def test_growth_of_an_empty_table() -> None:
    group = PairedGroup([(64, 8)], 8)
    for _ in range(3):
        assert group.grow(0)
    assert not group.grow(0)
    group.train(list(range(100)), [0] * 100)


def test_growth_of_one_table_leaves_the_others_alone() -> None:
    group = PairedGroup([(64, 8), (64, 8), (64, 8)], 8)
    group.train(list(range(90)), [table % 3 for table in range(90)])
    before = [chunk.digests.clone() for table in (0, 2) for chunk in group.memory.chunks[table]]
    group.grow(1)
    assert [len(chunks) for chunks in group.memory.chunks] == [1, 2, 1]
    after = [chunk.digests for table in (0, 2) for chunk in group.memory.chunks[table]]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("dim", [4, 20, 128])
def test_rows_move_with_every_byte_of_their_state(dim: int, kind: OptimizerKind, dtype: torch.dtype) -> None:
    memory = GroupMemory([TableGeometry.create(256, 64, 8)], RowLayout(dim, dtype, kind))
    generator = torch.Generator().manual_seed(dim)
    chunk = memory.chunks[0][0]
    chunk.rows.random_(0, 256, generator=generator)
    unique = distinct(list(range(50)))
    slots = find(memory.view, unique)
    insertion = insert(memory.view, unique, slots, Scores(int64(range(len(slots)))))
    placed = insertion.status != KeyStatus.REFUSED
    rows = memory.row_bytes(slots)
    for _ in range(2):
        old_rows, old_keys = chunk.rows.clone(), chunk.keys.clone()
        memory.grow(0)
        moved_slots = find(memory.view, unique)
        assert torch.equal(moved_slots >= 0, placed)
        assert torch.equal(memory.row_bytes(moved_slots), rows)
        stayed = chunk.digests != 0
        assert torch.equal(chunk.rows[stayed], old_rows[stayed]) and torch.equal(chunk.keys[stayed], old_keys[stayed])
    assert any(handle >> 40 for handle in moved_slots.tolist()) and not all(
        handle >> 40 for handle in moved_slots.tolist()
    )


@pytest.mark.parametrize("capacity", BUCKET_CAPACITIES)
def test_a_full_table_splits_about_in_half(capacity: int) -> None:
    buckets = 1024 // capacity
    group = PairedGroup([(2 * buckets * capacity, buckets * capacity)], capacity)
    # Small batches: of one that overflows a bucket, the keys with the least mixed keys stay, all in the lower half.
    for first in range(0, 5 * 1024, 256):
        group.train(list(range(first, first + 256)), [0] * 256)
    assert len(group.models[0].place_of) > 1000
    group.grow(0)
    new = sum(int((chunk.digests != 0).sum()) for chunk in group.memory.chunks[0][1:])
    assert 400 < new < 620


def test_emptied_slots_are_used_again() -> None:
    group = PairedGroup([(16, 8)], 8)
    group.train(list(range(8)), [0] * 8)
    group.grow(0)
    emptied = [slot for slot in range(8) if slot not in group.memory.occupied(0)]
    assert 0 < len(emptied) < 8
    newcomers = [key for key in range(100, 200) if group.models[0].bucket(key) == 0][: len(emptied)]
    group.train(newcomers, [0] * len(newcomers))
    assert [group.models[0].slot(key) for key in sorted(newcomers, key=oracle.mix64)] == emptied


def test_many_buckets_in_two_threads(two_threads: None) -> None:
    group = PairedGroup([(8 * 20_000, 8 * 5_000)], 8)
    group.train(list(range(0, 30_000_000, 1000)), [0] * 30_000)
    assert group.grow(0) and group.grow(0)
