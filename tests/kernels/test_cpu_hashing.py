"""Mixing and owners on the CPU engine, against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamicemb.kernels.hashing import mix64, owners
from tests import oracle, tolerances
from tests.kernels.keys import EXTREME_KEYS, STRUCTURED_KEYS, chi_square_sigmas
from tests.kernels.paired import int64

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INT64, max_size=50))
def test_mix64(keys: list[int]) -> None:
    assert mix64(int64(keys)).tolist() == [oracle.signed(oracle.mix64(key)) for key in keys]


@given(st.lists(INT64, max_size=50), st.integers(1, 2**31 - 1))
def test_owners(keys: list[int], world_size: int) -> None:
    assert owners(int64(keys), world_size).tolist() == [oracle.owner(key, world_size) for key in keys]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8, 1000])
def test_extreme_keys(world_size: int) -> None:
    keys = [*EXTREME_KEYS, *(oracle.unmix64(mixed) for mixed in (0, 1, 2**63 - 1, 2**63, oracle.MASK))]
    assert mix64(int64(keys)).tolist() == [oracle.signed(oracle.mix64(key)) for key in keys]
    assert owners(int64(keys), world_size).tolist() == [oracle.owner(key, world_size) for key in keys]


def test_owners_at_the_borders_of_ranges() -> None:
    for world_size in (2, 3, 5, 1023):
        borders = [-(-rank * 2**64 // world_size) for rank in range(1, world_size)]
        keys = [oracle.unmix64(mixed) for border in borders for mixed in (border - 1, border)]
        assert owners(int64(keys), world_size).tolist() == [
            r for rank in range(1, world_size) for r in (rank - 1, rank)
        ]


def test_mix64_of_many_keys_in_two_threads_is_a_bijection(two_threads: None) -> None:
    keys = torch.arange(-50_000, 50_000) * 0x1234567
    mixed = mix64(keys)
    assert mixed.dtype == torch.int64 and mixed.unique().numel() == keys.numel()
    assert mixed[::997].tolist() == [oracle.signed(oracle.mix64(key)) for key in keys[::997].tolist()]


def test_other_id_types_widen() -> None:
    unsigned = torch.tensor([0, 2**63, 2**64 - 1], dtype=torch.uint64).view(torch.int64)
    narrow = torch.tensor([0, -(2**31), 2**31 - 1], dtype=torch.int32).long()
    for keys in (unsigned, narrow):
        assert mix64(keys).tolist() == [oracle.signed(oracle.mix64(key)) for key in keys.tolist()]


def test_empty() -> None:
    assert mix64(int64([])).shape == owners(int64([]), 3).shape == (0,)


@pytest.mark.parametrize("name", STRUCTURED_KEYS)
@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
def test_owners_are_balanced(name: str, world_size: int) -> None:
    counts = torch.bincount(owners(STRUCTURED_KEYS[name], world_size), minlength=world_size)
    assert abs(chi_square_sigmas(counts)) < tolerances.CHI_SQUARE_SIGMAS
