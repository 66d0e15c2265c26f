"""Deduplication on the Triton engine, against the CPU engine."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.dedup import triton as triton_dedup
from dynamicemb.kernels.launch import Launch, intercepted
from tests import oracle
from tests.kernels.group_state import assert_same_unique, both_engines
from tests.kernels.keys import EXTREME_KEYS
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS

TILE, CHUNK, SHORT_RUN = 16, 32, 4


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that let a few dozen keys reach every path."""
    monkeypatch.setattr(triton_dedup, "_TILE", TILE)
    monkeypatch.setattr(triton_dedup, "_CHUNK", CHUNK)
    monkeypatch.setattr(triton_dedup, "_SHORT_RUN", SHORT_RUN)


def batch(size: int, distinct: int, tables: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``size`` draws from ``distinct`` keys in ``tables`` tables."""
    generator = torch.Generator().manual_seed(size + tables)
    pool = torch.randint(-(2**63), 2**63 - 1, (distinct,), generator=generator)
    pool[: len(EXTREME_KEYS)] = torch.tensor(EXTREME_KEYS)[:distinct]
    keys = pool[torch.randint(0, distinct, (size,), generator=generator)]
    return keys, torch.randint(0, tables, (size,), generator=generator, dtype=torch.int32)


def assert_agree(keys: torch.Tensor, tables: torch.Tensor, num_tables: int = 1, world_size: int = 1) -> None:
    """Both engines, and everything that has to follow the last entry."""
    expected, actual = both_engines(dedup, keys, tables, num_tables, world_size)
    assert_same_unique(expected, actual)
    count, size = expected.keys.numel(), keys.numel()
    assert (actual.keys.shape, actual.tables.shape, actual.offsets.shape) == ((size,), (size,), (size + 1,))
    assert not actual.tables[count:].any()
    assert (actual.offsets[count:] == size).all()


# The last two leave 7,158,278 and 53,687 prefixes to a table of a rank.
@pytest.mark.parametrize(("tables", "world_size"), [(1, 1), (1, 3), (5, 1), (3, 2), (300, 2), (20_000, 4)])
@pytest.mark.parametrize("size", [0, 1, 2, 1023, 1024, 1025, 2500])
def test_distinct_keys_agree(size: int, tables: int, world_size: int) -> None:
    assert_agree(*batch(size, max(size // 3, 1), tables), tables, world_size)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 33, 256, 257, 300])
def test_sizes_around_tiles(size: int) -> None:
    """More tiles than a tile has lanes, too: what adds them up takes more than one turn."""
    assert_agree(*batch(size, max(size // 3, 1), 3), 3, 2)


@pytest.mark.parametrize(("tables", "world_size"), [(2**31 - 1, 1), (1, 2**31 - 1), (2**15, 2**15), (2**20, 1000)])
def test_as_many_tables_and_ranks_as_there_may_be(tables: int, world_size: int) -> None:
    """Next to nothing is left of a prefix but the group, so keys of one table share it."""
    keys, _ = batch(120, 50, 1)
    indices = torch.randint(0, 3, (120,), generator=torch.Generator().manual_seed(5)) * (tables - 1) // 2
    assert_agree(keys, indices.to(torch.int32), tables, world_size)


def test_duplicates_alone_need_no_second_look() -> None:
    """Where prefixes tell all keys apart, the kernel for those that share one has nothing to do."""

    def run_others(call: Launch) -> None:
        if call.kernel is not triton_dedup._settle_kernel:
            call.run()

    with intercepted(run_others):
        assert_agree(*batch(2500, 800, 3), 3, 2)


def test_keys_of_one_rank_spread_over_its_share_of_prefixes() -> None:
    """Of 2**32 prefixes, 2**20 ranks have 2**12 each, and 4 tables of a rank 2**10 of those."""
    keys = torch.tensor([oracle.unmix64(5 << 44 | place << 34) for place in range(2**10)])
    tables = torch.full(keys.shape, 2, dtype=torch.int32)
    with engine("triton"):
        prefixes, _ = triton_dedup._sorted_prefixes(keys.to(DEVICE), tables.to(DEVICE), 4, 2**20)
    first = (5 * 4 + 2) * 2**10 - 2**31
    assert prefixes.tolist() == list(range(first, first + 2**10))


def test_one_key_many_times() -> None:
    assert_agree(torch.full((3000,), -1), torch.zeros(3000, dtype=torch.int32))


def test_every_key_once() -> None:
    assert_agree(torch.arange(2100) - 1000, torch.zeros(2100, dtype=torch.int32))


def test_keys_that_begin_at_an_odd_address() -> None:
    keys, tables = batch(90, 20, 3)
    assert_agree(keys[1:], tables[1:], 3, 2)


Run = Sequence[int]


def interleaved(runs: Sequence[Run], seed: int) -> torch.Tensor:
    """Keys of which those of one run share the high half of their mixed form; the run lists the low halves.

    With one table and one rank that is the prefix. Runs follow each other in the sorted batch and are mixed up in this
    one, each in its own order.
    """
    owners = [number for number, run in enumerate(runs) for _ in run]
    random.Random(seed).shuffle(owners)
    waiting = [iter(run) for run in runs]
    return torch.tensor([oracle.unmix64((number + 1) << 32 | next(waiting[number])) for number in owners])


def assert_runs_agree(runs: Sequence[Run], seed: int = 0) -> None:
    keys = interleaved(runs, seed)
    assert_agree(keys, torch.zeros(keys.shape, dtype=torch.int32))


#: Runs of different keys: pairs, triples, a frequent key with a stranger anywhere, and crowds, from short to long.
CONFLICTS: dict[str, Run] = {
    "pair in order": [3, 9],
    "pair out of order": [9, 3],
    "triple": [9, 3, 6],
    "low halves with the top bit": [2**31, 2**32 - 1, 0],
    "short, equal ones": [9, 3, 9, 3],
    "short, alternating": [3, 9, 3],
    "tile": [*[9] * 15, 3],
    "chunk": [*[9] * 31, 3],
    "stranger first": [3, *[9] * 20],
    "stranger first out of order": [9, *[3] * 20],
    "stranger in between": [*[9] * 11, 3, *[9] * 11],
    "stranger twice": [*[9] * 11, 3, *[9] * 11, 3, *[9] * 5],
    "stranger last": [*[9] * 50, 3],
    "greater stranger last": [*[3] * 50, 9],
    "two strangers": [*[6] * 50, 9, *[6] * 9, 3],
    "two crowds": [9, 3] * 30,
    "crowds of three": [9, 3, 6] * 20,
    "all different": [(37 * number) % 61 for number in range(61)],
    "some twice": [(37 * number) % 41 for number in range(61)],
    "keys that differ in one bit each": [0, *[1 << bit for bit in reversed(range(32))]],
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CONFLICTS)
def test_keys_that_share_a_prefix(name: str) -> None:
    """Alone, among other runs of different keys, and between frequent keys."""
    run = CONFLICTS[name]
    assert_runs_agree([*[[5]] * 7, run, [9, 3], [5] * 20, [4, 2, 4], [1]])
    assert_runs_agree([[5] * 50, run, [5] * 30])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("run", [[9, 3], [3, 9, 9, 3, 9]], ids=str)
def test_keys_that_share_a_prefix_at_every_place_of_a_tile(run: Run) -> None:
    assert_runs_agree([other for place in range(TILE + 1) for other in [*[[5]] * place, run]])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(6))
def test_any_runs(seed: int) -> None:
    generator = random.Random(seed)
    runs = []
    for _ in range(25):
        pool = [generator.getrandbits(8) for _ in range(generator.choice([1, 1, 1, 2, 2, 3, 9]))]
        weights = [generator.choice([1, 20]) for _ in pool]
        runs.append(generator.choices(pool, weights, k=generator.choice([1, 1, 2, 3, 5, 8, 16, 17, 40])))
    assert_runs_agree(runs, seed)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("stranger_at", [0, 15, 16, 300, 319])
def test_a_run_of_more_tiles_than_a_tile_has_lanes(stranger_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_dedup, "_CHUNK", 256)
    run = [9] * 320
    run[stranger_at] = 3
    assert_runs_agree([[5], run, [4, 2]])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("tables", "world_size"), [(1, 2), (3, 1), (5, 4)])
def test_shared_prefixes_in_several_tables_and_ranks(tables: int, world_size: int) -> None:
    """Crowds of neighbouring mixed keys, which no prefix tells apart, everywhere in every owner's range."""
    generator = random.Random(tables)
    pool = []
    for _ in range(8):
        crowd = generator.randrange(2**64 - 8)
        pool += [oracle.unmix64(crowd + step) for step in range(generator.randrange(1, 5))]
    edges = [owner * 2**64 // world_size for owner in range(1, world_size)]
    pool += [oracle.unmix64(edge + step) for edge in edges for step in range(-2, 3)]
    keys = torch.tensor(generator.choices(pool, k=150))
    assert_agree(keys, torch.tensor(generator.choices(range(tables), k=150), dtype=torch.int32), tables, world_size)


def test_shared_prefixes_in_tiles_of_full_size() -> None:
    """A pair across the border of a tile, a short run, and runs of a frequent key over several tiles."""
    short, frequent = [9, 3, 6] * 9, [*[9] * 1700, 3, *[9] * 900]
    assert_runs_agree([[5] * 1023, [9, 3], short, frequent, [7, 2], [*[3] * 100, 9]])


def test_one_busy_table_among_many() -> None:
    """80,000 groups share 2**32 prefixes out among them, so 2,000 keys of one table collide by themselves."""
    keys = torch.randint(-(2**63), 2**63 - 1, (2000,), generator=torch.Generator().manual_seed(1))
    keys = keys[torch.randint(0, 2000, (3000,), generator=torch.Generator().manual_seed(2))]
    tables = torch.full(keys.shape, 17_000, dtype=torch.int32)
    mixed = sorted({oracle.mix64(key) for key in keys.tolist()})
    assert len({h * 4 % 2**64 * (2**32 // 80_000) // 2**64 + (h * 4 // 2**64 << 32) for h in mixed}) < len(mixed)
    assert_agree(keys, tables, 20_000, 4)
