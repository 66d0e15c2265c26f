"""Mixing and owners on the Triton engine."""

from __future__ import annotations

import pytest
import torch

from dynamicemb.kernels.hashing import mix64, owners
from tests.kernels.group_state import both_engines
from tests.kernels.keys import EXTREME_KEYS
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


def some_keys(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    extremes = torch.tensor(EXTREME_KEYS)[:count]
    keys[: extremes.numel()] = extremes
    return keys


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_mixed_keys_agree(count: int) -> None:
    expected, actual = both_engines(mix64, some_keys(count))
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 4096, 2**31 - 1])
def test_owners_agree(world_size: int) -> None:
    expected, actual = both_engines(owners, some_keys(1500), world_size)
    assert torch.equal(actual.cpu(), expected)


def test_keys_need_not_be_contiguous() -> None:
    keys = some_keys(200)
    expected, _ = both_engines(mix64, keys[::2].contiguous())
    with engine("triton"):
        assert torch.equal(mix64(keys.to(DEVICE)[::2]).cpu(), expected)
