"""Insertion and eviction on the Triton engine where its programs and windows meet: the bytes of the CPU engine.

Only ``insert`` runs on the Triton engine here, on slots that the CPU engine found. A table of one bucket makes a run of
keys of any length: the keys of table t are neighbours in the batch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.find import find
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import NO_SLOT, OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import KeyStatus, Scores
from tests.kernels.group_state import Twins, on_device
from tests.kernels.keys import random_key
from tests.kernels.triton_host import MARKS, engine

pytestmark = MARKS

LAYOUT = RowLayout(4, torch.float32, OptimizerKind.SGD)
EXTREME_SCORES = torch.tensor([2**63 - 1, -(2**63), 2**63 - 1, 0, -1, 2**63 - 1, 2**63 - 2])


def single_buckets(capacity: int, tables: int) -> Twins:
    return Twins([TableGeometry.create(capacity, capacity, capacity)] * tables, LAYOUT)


def runs(lengths: Sequence[int], first_key: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and tables of a batch with ``lengths[t]`` keys of table t, counted up from ``first_key``."""
    keys = torch.cat([torch.arange(first_key, first_key + length) for length in lengths])
    return keys, torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))


def fill(pair: Twins, keys: torch.Tensor, tables: torch.Tensor, scores: torch.Tensor) -> None:
    """Inserts keys by the CPU engine alone, and copies its memory."""
    with engine("cpu"):
        unique = dedup(keys, tables, len(pair.cpu.geometries), 1)
        scores = scores.repeat(-(-keys.numel() // scores.numel()))[: keys.numel()].contiguous()
        insert(pair.cpu.view, unique, find(pair.cpu.view, unique), Scores(scores))
    for ours, theirs in zip(pair.cpu.chunks, pair.triton.chunks, strict=True):
        for chunk, copy in zip(ours, theirs, strict=True):
            for part, copied in zip(chunk.parts, copy.parts, strict=True):
                copied.copy_(part)


def padded(values: torch.Tensor, padding: int) -> torch.Tensor:
    """``values``, and ``padding`` more that read like a missing key of the last one's bucket, where Triton works."""
    more = torch.full((padding,), NO_SLOT, dtype=values.dtype) if values.dtype is torch.int64 else values[-1:]
    return on_device(torch.cat([values, more.expand(padding)]))


def insert_on_both(
    pair: Twins, keys: torch.Tensor, tables: torch.Tensor, scores: torch.Tensor, padding: int = 0
) -> list[int]:
    """Compares outcomes, slots and memory. Returns how many keys were found, inserted, replaced, refused."""
    with engine("cpu"):
        unique = dedup(keys, tables, len(pair.cpu.geometries), 1)
        count = unique.keys.numel()
        scores = scores.repeat(-(-count // scores.numel()))[:count].contiguous()
        slots = find(pair.cpu.view, unique)
        there = dataclasses.replace(
            on_device(unique), keys=padded(unique.keys, padding), tables=padded(unique.tables, padding)
        )
        there_slots, there_scores = padded(slots, padding), padded(scores, padding)
        expected = insert(pair.cpu.view, unique, slots, Scores(scores))
    with engine("triton"):
        actual = insert(pair.triton.view, there, there_slots, Scores(there_scores))
    assert torch.equal(actual.status[:count].cpu(), expected.status)
    assert torch.equal(there_slots.cpu(), torch.cat([slots, torch.full((padding,), NO_SLOT)]))
    replaced = expected.status == KeyStatus.REPLACED
    assert torch.equal(actual.evicted_keys[:count].cpu()[replaced], expected.evicted_keys[replaced])
    assert torch.equal(actual.evicted_scores[:count].cpu()[replaced], expected.evicted_scores[replaced])
    pair.compare()
    return torch.bincount(expected.status.to(torch.int64), minlength=len(KeyStatus)).tolist()


# A tile has 248 keys of buckets of 8 slots, 128 of 128; a window has 31, and the one before it.
@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        (8, [30, 1, 31, 1, 32, 1, 62, 63]),
        (8, [31] * 8 + [31, 2]),
        (8, [248, 40, 3]),
        (8, [5, 500, 3]),
        (8, [3] * 100),
        (64, [4] * 50),
        (128, [125, 4, 3]),
        (128, [97, 30, 1, 31]),
        (256, [70, 3, 60]),
    ],
)
def test_runs_that_meet_windows_and_tiles(capacity: int, lengths: list[int]) -> None:
    """Into empty buckets; then half of the keys anew, so that found and missing ones alternate."""
    pair = single_buckets(capacity, len(lengths))
    fitting = sum(min(length, capacity) for length in lengths)
    keys, tables = runs(lengths)
    assert insert_on_both(pair, keys, tables, torch.tensor([1])) == [0, fitting, 0, sum(lengths) - fitting]
    anew = torch.where(keys % 2 == 0, keys, keys + 10_000)
    insert_on_both(pair, anew, tables, torch.tensor([3, 2, 4]), padding=400)


# Tiles of 128 keys begin at 0, 128 and 256. The second bucket begins in the first one and ends in the second.
@pytest.mark.parametrize("missing", [0, 99, 100, 127, 128, 227, 228, 255, 256, 327])
def test_one_missing_key_among_found_ones(missing: int) -> None:
    """A program that looked past it would leave it out."""
    pair = single_buckets(128, 3)
    keys, tables = runs([100, 128, 100])
    with engine("cpu"):
        place = dedup(keys, tables, 3, 1).inverse
    fill(pair, keys[place != missing], tables[place != missing], torch.tensor([1]))
    assert insert_on_both(pair, keys, tables, torch.tensor([1]), padding=1) == [327, 1, 0, 0]
    assert insert_on_both(pair, keys, tables, torch.tensor([1]), padding=1) == [328, 0, 0, 0]


def test_a_program_with_several_tiles() -> None:
    """More tiles than the interpreter has programs; a miss in a program's first tile, and one in a second."""
    pair = Twins([TableGeometry.create(2**15, 2**15, 8)], LAYOUT)
    keys = torch.arange(8500)
    tables = torch.zeros(8500, dtype=torch.int32)
    with engine("cpu"):
        place = dedup(keys, tables, 1, 1).inverse
    old = (place != 3) & (place != 8000)
    fill(pair, keys[old], tables[old], torch.tensor([1]))
    assert insert_on_both(pair, keys, tables, torch.tensor([2]), padding=1) == [8498, 2, 0, 0]


@pytest.mark.parametrize("capacity", [8, 16, 32, 64, 128, 256])
def test_victims_by_extreme_scores(capacity: int) -> None:
    """Many keys have the same score, the greatest one of all too."""
    pair = single_buckets(capacity, 2)
    fill(pair, *runs([capacity, capacity]), EXTREME_SCORES)
    for first_key in (1000, 2000):
        batch = runs([capacity // 4, 3], first_key)
        assert insert_on_both(pair, *batch, EXTREME_SCORES[:4]) == [0, 0, capacity // 4 + 3, 0]


@pytest.mark.parametrize("capacity", [16, 64, 128, 256])
def test_more_full_buckets_in_a_window_than_rows(capacity: int) -> None:
    """One or two new keys for each bucket, and up to two that are found."""
    generator = random.Random(capacity)
    pair = single_buckets(capacity, 60)
    fill(pair, *runs([capacity] * 60), EXTREME_SCORES)
    keys, tables = [], []
    for table in range(60):
        new = generator.randrange(1, 3)
        keys += [*generator.sample(range(capacity), generator.randrange(3)), *range(1000, 1000 + new)]
        tables += [table] * (len(keys) - len(tables))
    found, inserted, replaced, refused = insert_on_both(
        pair, torch.tensor(keys), torch.tensor(tables, dtype=torch.int32), EXTREME_SCORES[1:], padding=7
    )
    assert (found + replaced, inserted, refused) == (len(keys), 0, 0)
    assert found > 30 and replaced > 60


@pytest.mark.parametrize("capacity", [8, 128])
def test_found_keys_and_full_buckets(capacity: int) -> None:
    """Every key of the bucket is in the batch, and more: all of those are refused, in several windows."""
    pair = single_buckets(capacity, 3)
    fill(pair, *runs([capacity] * 3), torch.tensor([1]))
    assert insert_on_both(pair, *runs([capacity, capacity + 100, capacity]), torch.tensor([0])) == [
        3 * capacity, 0, 0, 100,
    ]  # fmt: skip


def test_buckets_with_holes_after_growth() -> None:
    """Doubling takes about half of a bucket's keys out of its middle; new keys fill the holes, then evict."""
    generator = random.Random(1)
    pair = Twins([TableGeometry.create(16 * 6, 16, 16), TableGeometry.create(16 * 3, 16, 16)], LAYOUT)
    pool = [random_key(generator) for _ in range(300)]
    outcomes = torch.zeros(len(KeyStatus), dtype=torch.int64)
    for step in range(6):
        keys = torch.tensor(generator.sample(pool, generator.choice([20, 60, 200])))
        tables = torch.tensor(generator.choices([0, 0, 1], k=keys.numel()), dtype=torch.int32)
        outcomes += torch.tensor(insert_on_both(pair, keys, tables, EXTREME_SCORES[step % 3 :], padding=step))
        if pair.cpu.geometries[step % 2].can_grow:
            pair.grow(step % 2)
    assert (outcomes > 0).all(), "the sequence does not test what it is for"
