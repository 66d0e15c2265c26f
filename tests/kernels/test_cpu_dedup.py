"""Deduplication and sums over duplicates on the CPU engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamicemb.kernels.dedup import cpu, dedup
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


# ------------------------------------------------------------------------------------------- tables one after the other


def numbers_of_tables(lengths: Sequence[Sequence[int]]) -> list[int]:
    """The table of each key of a batch in parts."""
    return [table for part in lengths for table, length in enumerate(part) for _ in range(length)]


def sorted_by_numpy(keys: np.ndarray, tables: np.ndarray, world_size: int) -> dict[str, np.ndarray]:
    """What deduplication returns, by a stable sort of everything at once: for batches too long for the oracle."""
    steps = [(np.uint64(shift), np.uint64(factor)) for shift, factor in oracle.MIX_STEPS]
    mixed = keys.view(np.uint64) + np.uint64(oracle.GAMMA)
    for shift, factor in steps:
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed ^= mixed >> np.uint64(oracle.MIX_LAST_SHIFT)
    owners = np.zeros(keys.size, np.int64)
    for rank in range(1, world_size):
        owners += mixed >= np.uint64(-(-rank * 2**64 // world_size))
    order = np.lexsort((mixed, tables, owners))
    ordered, ordered_tables = keys[order], tables[order]
    first = np.ones(keys.size, bool)
    first[1:] = (ordered[1:] != ordered[:-1]) | (ordered_tables[1:] != ordered_tables[:-1])
    inverse = np.empty(keys.size, np.int64)
    inverse[order] = first.cumsum() - 1
    offsets = np.append(np.flatnonzero(first), keys.size)
    entries = {"keys": ordered[first], "tables": ordered_tables[first], "offsets": offsets}
    return {**entries, "inverse": inverse, "order": order}


def assert_sorted(keys: np.ndarray, lengths: Sequence[Sequence[int]], world_size: int) -> None:
    tables = np.array(numbers_of_tables(lengths), np.int32)
    expected = sorted_by_numpy(keys, tables, world_size)
    for known in (lengths, None):
        actual = dedup(torch.from_numpy(keys), torch.from_numpy(tables), len(lengths[0]), world_size, known)
        for name, array in expected.items():
            np.testing.assert_array_equal(getattr(actual, name).numpy(), array, name)
        assert actual.count.tolist() == [expected["keys"].size]


@given(
    lengths=st.integers(1, 6).flatmap(
        lambda tables: st.lists(
            st.lists(st.sampled_from([0, 0, 1, 2, 5, 40]), min_size=tables, max_size=tables), min_size=1, max_size=4
        )
    ),
    world_size=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_any_parts(lengths: list[list[int]], world_size: int, seed: int) -> None:
    generator = random.Random(seed)
    tables = numbers_of_tables(lengths)
    keys = [generator.choice([*EXTREME_KEYS, random_key(generator)]) for _ in tables]
    expected = oracle.dedup(keys, tables, world_size)
    actual = dedup(int64(keys), int32(tables), len(lengths[0]), world_size, lengths)
    for name in ("keys", "tables", "inverse", "order", "offsets"):
        assert getattr(actual, name).tolist() == getattr(expected, name), name


#: A table is divided from 16,385 keys on, in pieces of 8,192 at least.
LONG = 1 << 14
LARGEST = "more pieces than there are"
#: Lengths by sender and table.
LAYOUTS = {
    "none": [[0]],
    "one": [[1]],
    "undivided": [[LONG]],
    "divided": [[LONG + 1]],
    "a piece more": [[3 * (1 << 13) + 1]],
    LARGEST: [[(1 << 18) + 5]],
    "long and short ones": [[0, 20_000, 1, 0, 300, 17_000, 0]],
    "one giant": [[3, 0, 50_000, 2]],
    "halves of a long one": [[10_000, 7], [10_000, 0], [0, 9]],
    "long only together": [[LONG // 4, 100]] * 5,
    "many": [[200] * 100],
    "no keys of any": [[0] * 5] * 3,
}


def drawn_from(pool: Sequence[int]) -> Callable[[int, random.Random], list[int]]:
    return lambda size, generator: generator.choices(pool, k=size)


def in_descending_order(size: int, generator: random.Random) -> list[int]:
    return [oracle.unmix64(mixed) for mixed in sorted((generator.getrandbits(64) for _ in range(size)), reverse=True)]


def with_equal_top_bits(bits: int) -> Callable[[int, random.Random], list[int]]:
    return lambda size, generator: [
        oracle.unmix64((0xABCDEF << 40 >> (64 - bits) << (64 - bits)) | generator.getrandbits(64 - bits))
        for _ in range(size)
    ]


BATCHES: dict[str, Callable[[int, random.Random], list[int]]] = {
    "few": drawn_from(range(5)),
    "all equal": drawn_from([-1]),
    "distinct": lambda size, generator: list(range(-(size // 2), size - size // 2)),
    "half of them distinct": lambda size, generator: generator.choices(range(size or 1), k=size),
    "descending": in_descending_order,
    "equal top bits": with_equal_top_bits(24),
    "words differ in positions only": with_equal_top_bits(56),
}


@pytest.mark.parametrize(
    ("layout", "batch"),
    [*itertools.product([name for name in LAYOUTS if name != LARGEST], BATCHES), (LARGEST, "half of them distinct")],
)
def test_tables_one_after_the_other(layout: str, batch: str) -> None:
    lengths = LAYOUTS[layout]
    size = sum(map(sum, lengths))
    keys = np.array(BATCHES[batch](size, random.Random(size)), np.int64)
    for world_size in (1, 3):
        assert_sorted(keys, lengths, world_size)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("layout", ["undivided", "divided", "long and short ones", "halves of a long one", "many"])
def test_any_number_of_threads(layout: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each range of the work is as short as it can be, and begins and ends where it may."""
    for name in ("_MIN_PIECES_PER_THREAD", "_MIN_WORDS_TO_SORT", "_MIN_WORDS_TO_WRITE"):
        monkeypatch.setattr(cpu, name, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for world_size, batch in itertools.product((1, 2, 8), ("half of them distinct", "all equal")):
            size = sum(map(sum, LAYOUTS[layout]))
            assert_sorted(np.array(BATCHES[batch](size, random.Random(7)), np.int64), LAYOUTS[layout], world_size)
    finally:
        torch.set_num_threads(before)


def test_a_frequent_key_beside_another_of_its_cell() -> None:
    """Insertion alone would take as many moves as there are pairs of the two."""
    low, high = (oracle.unmix64((77 << 40) + bit) for bit in (0, 1 << 39))
    assert_sorted(np.array([high, low] * 30_000 + [high] * 5, np.int64), [[60_005]], 1)


def test_memory_of_an_earlier_batch() -> None:
    """Scratch is kept, and still holds what a longer batch has left there."""
    generator = random.Random(8)
    for size in (40_000, 20_000, 3, 0, 17_000, 41_000):
        keys = np.array([generator.randrange(size) for _ in range(size)], np.int64)
        assert_sorted(keys, [[size // 3, size - size // 3]], 2)


@pytest.mark.parametrize("lengths", [[3], [2, 2], [2, 4]])
def test_lengths_that_do_not_add_up_are_refused(lengths: list[int]) -> None:
    """They would lead out of the memory of the batch."""
    with pytest.raises(AssertionError, match="5 in the batch"):
        dedup(int64(range(5)), int32([0] * 5), len(lengths), 1, [lengths])
