"""Who checks the oracle: published vectors, the standard library, and small cases worked out by hand."""

from __future__ import annotations

import itertools
import random
from statistics import NormalDist

import numpy as np
import pytest

from tests import oracle, oracle_values, tolerances

# First outputs of SplitMix64 from the state 1234567, as published for the reference implementation.
SPLITMIX_STATE = 1234567
SPLITMIX_OUTPUTS = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)

# (counter, key, result) of Philox4x32-10 from the known-answer file of the Random123 distribution.
PHILOX_VECTORS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def test_mix64_is_splitmix64() -> None:
    states = itertools.count(SPLITMIX_STATE, oracle.GAMMA)
    assert tuple(oracle.mix64(state) for state, _ in zip(states, SPLITMIX_OUTPUTS)) == SPLITMIX_OUTPUTS


def test_unmix64_inverts_mix64() -> None:
    generator = random.Random(1)
    for mixed in (0, 1, 2**63, oracle.MASK, *(generator.getrandbits(64) for _ in range(1000))):
        key = oracle.unmix64(mixed)
        assert -(2**63) <= key < 2**63
        assert oracle.mix64(key) == mixed


def test_digest_covers_1_to_255() -> None:
    digests = [oracle.digest(oracle.unmix64(low)) for low in range(65536)]
    assert (digests[0], digests[-1]) == (1, 255)
    assert sorted(set(digests)) == list(range(1, 256))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_owner_and_bucket_are_monotone_in_the_mixed_key(world_size: int) -> None:
    generator = random.Random(2)
    keys = [oracle.unmix64(mixed) for mixed in sorted(generator.getrandbits(64) for _ in range(2000))]
    tables = [oracle.TableModel(11 * 8, 11 * 8, 8, world_size, rank) for rank in range(world_size)]
    places = [(rank, tables[rank].bucket(key)) for key in keys for rank in [oracle.owner(key, world_size)]]
    assert places == sorted(places)
    assert set(places) == set(itertools.product(range(world_size), range(11)))


@pytest.mark.parametrize("low_bits", [None, 0, 777, 65535])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_colliding_keys_collide(fraction: float, low_bits: int | None) -> None:
    for world_size, rank in ((1, 0), (3, 2)):
        keys = oracle.colliding_keys(rank, world_size, fraction, low_bits, 600)
        table = oracle.TableModel(2**20 * 8, 8, 8, world_size, rank)
        table.shift = 0
        assert len(set(keys)) == 600
        assert {oracle.owner(key, world_size) for key in keys} == {rank}
        assert len({table.bucket(key) for key in keys}) == 1
        digests = {oracle.digest(key) for key in keys}
        assert len(digests) == 1 if low_bits is not None else len(digests) > 200


def test_places_after_three_doublings() -> None:
    table = oracle.TableModel(8 * 8, 8, 8)
    assert (table.buckets, table.shift) == (1, 3)
    for _ in range(3):
        table.grow()
    chunk_and_index = [divmod(table.handle(bucket, 5), 1 << 40) for bucket in range(8)]
    # Bucket 0 is the first; 4 came with the first doubling, 2 and 6 with the second, 1, 3, 5, 7 with the third.
    assert chunk_and_index == [(0, 5), (3, 5), (2, 5), (3, 13), (1, 5), (3, 21), (2, 13), (3, 29)]


def test_insert_by_hand() -> None:
    table = oracle.TableModel(8, 8, 8)
    old = list(range(8))
    assert [outcome.slot for outcome in table.insert(old, [5, 3, 3, 9, 1, 3, 7, 7])] == old
    assert table.find([4], [6]) == [4]
    outcomes = table.insert([1, 100, 101, 102], [50, 10, 11, 12])
    assert [outcome.status for outcome in outcomes] == [0, 2, 2, 2]
    assert [outcome.evicted_key for outcome in outcomes] == [None, 2, 5, 0]
    assert [outcome.evicted_score for outcome in outcomes] == [None, 3, 3, 5]
    assert [outcome.slot for outcome in outcomes] == [1, 2, 5, 0]
    outcomes = table.insert(list(range(200, 209)), [0] * 9)
    assert [outcome.status for outcome in outcomes] == [2] * 8 + [3]
    assert sorted(table.place_of) == list(range(200, 208))


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_VECTORS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in oracle_values.philox(counter, key)) == words


def test_normal_quantile_against_the_standard_library() -> None:
    tails = 2.0 ** -np.arange(2.0, 34.0)
    bound = oracle_values.TAIL_BOUND
    p = np.concatenate([np.linspace(0.001, 0.999, 1999), tails, 1 - tails, [bound, np.nextafter(bound, 0), 1 - bound]])
    expected = np.array([NormalDist().inv_cdf(value) for value in p])
    np.testing.assert_allclose(
        oracle_values.normal_quantile(p), expected, rtol=tolerances.NORMAL_QUANTILE_RTOL, atol=1e-15
    )


def test_rounding_by_hand() -> None:
    one_bf16, one_f16 = 2.0**-8, 2.0**-11  # half a unit in the last place at 1
    # 3.3962e38 lies above the middle between the greatest bfloat16 and 2**128.
    values = np.array([1 + one_bf16, 1 + 3 * one_bf16, 1 + one_bf16 * 1.01, -1 - one_bf16, 3.3962e38], np.float32)
    assert oracle_values.to_bfloat16(values).tolist() == [1, 1 + 4 * one_bf16, 1 + 2 * one_bf16, -1, np.inf]
    values = np.array([1 + one_f16, 1 + 3 * one_f16, 65519.0, 65520.0, 2.0**-25, 2.0**-24 * 1.5], np.float32)
    assert oracle_values.to_float16(values).tolist() == [1, 1 + 4 * one_f16, 65504, np.inf, 0, 2.0**-23]
