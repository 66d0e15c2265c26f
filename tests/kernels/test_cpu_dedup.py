"""Deduplication and sums over duplicates on the CPU engine."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.views import UniqueKeys
from tests import oracle
from tests.kernels.keys import EXTREME_KEYS, random_key
from tests.kernels.paired import distinct, int32, int64

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_dedup(keys: list[int], tables: list[int], num_tables: int, world_size: int) -> UniqueKeys:
    expected = oracle.dedup(keys, tables, world_size)
    actual = dedup(int64(keys), int32(tables), num_tables, world_size)
    assert (actual.keys.dtype, actual.tables.dtype, actual.inverse.dtype) == (torch.int64, torch.int32, torch.int64)
    assert (actual.order.dtype, actual.offsets.dtype, actual.count.dtype) == (torch.int64,) * 3
    assert actual.count.tolist() == [len(expected.keys)]
    assert actual.keys.tolist() == expected.keys
    assert actual.tables.tolist() == expected.tables
    assert actual.inverse.tolist() == expected.inverse
    assert actual.order.tolist() == expected.order
    assert actual.offsets.tolist() == expected.offsets
    return actual


FEW_KEYS = st.sampled_from([*EXTREME_KEYS, *range(8)])


@given(
    batch=st.lists(st.tuples(FEW_KEYS | st.integers(-(2**63), 2**63 - 1), st.integers(0, 4)), max_size=60),
    world_size=st.integers(1, 9),
)
def test_any_batch(batch: list[tuple[int, int]], world_size: int) -> None:
    assert_dedup([key for key, _ in batch], [table for _, table in batch], 5, world_size)


@pytest.mark.parametrize("size", [0, 1, 2, 127, 128, 129])
@pytest.mark.parametrize("world_size", [1, 3])
def test_sizes(size: int, world_size: int) -> None:
    generator = random.Random(size)
    assert_dedup(
        [random_key(generator) for _ in range(size)], [generator.randrange(3) for _ in range(size)], 3, world_size
    )


@pytest.mark.parametrize("key", EXTREME_KEYS)
def test_all_duplicates(key: int) -> None:
    unique = assert_dedup([key] * 257, [0] * 257, 1, 2)
    assert unique.keys.tolist() == [key]
    assert unique.order.tolist() == list(range(257))


def test_one_key_in_every_table() -> None:
    unique = assert_dedup([7] * 30, [table % 10 for table in range(30)], 10, 4)
    assert unique.tables.tolist() == list(range(10))


def test_mixed_keys_are_ordered_without_a_sign() -> None:
    keys = [oracle.unmix64(mixed) for mixed in (2**64 - 1, 2**63, 2**63 - 1, 0)]
    assert distinct(keys).keys.tolist() == keys[::-1]


def test_keys_whose_mixed_forms_differ_in_one_bit() -> None:
    generator = random.Random(3)
    base = generator.getrandbits(64)
    keys = [oracle.unmix64(base ^ (1 << bit)) for bit in range(64)] + [oracle.unmix64(base)]
    generator.shuffle(keys)
    assert_dedup(keys * 3, [0] * 195, 1, 3)


@pytest.mark.parametrize(("num_tables", "world_size"), [(26, 2), (1, 5000), (5000, 1), (1000, 2**20)])
def test_many_tables_and_ranks(num_tables: int, world_size: int) -> None:
    generator = random.Random(4)
    keys = [random_key(generator) for _ in range(300)]
    chosen = [generator.choice(keys) for _ in range(600)]
    assert_dedup(
        chosen, [generator.choice([0, num_tables - 1, num_tables // 2]) for _ in chosen], num_tables, world_size
    )


def test_a_long_batch_in_two_threads(two_threads: None) -> None:
    generator = random.Random(5)
    keys = [random_key(generator) % 30_000 for _ in range(50_000)]
    assert_dedup(keys, [generator.randrange(7) for _ in keys], 7, 3)


@pytest.mark.parametrize("num_tables", [1, 3])
@pytest.mark.parametrize("distinct_keys", [2, 40, 3000])
def test_keys_whose_top_bits_are_equal(num_tables: int, distinct_keys: int) -> None:
    """The sort looks at the top bits first; a batch in which they say nothing is in order all the same."""
    generator = random.Random(distinct_keys)
    top = generator.randrange(2**22) << 42
    pool = [oracle.unmix64(top | generator.randrange(2**42)) for _ in range(distinct_keys)]
    keys = generator.choices(pool, k=4000)
    assert_dedup(keys, [generator.randrange(num_tables) for _ in keys], num_tables, 2)
