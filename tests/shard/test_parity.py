"""A dynamic table and a table of torchrec (or of torch) that begin alike stay alike."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests import tolerances
from tests.distributed import run_on_ranks
from tests.shard import parity

pytestmark = [
    pytest.mark.parametrize("optimizer", list(parity.OPTIMIZERS)),
    pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)]),
]


@functools.cache
def results(world_size: int, optimizer: str) -> list[dict[str, Any]]:
    """One run for all tests, by rank."""
    return run_on_ranks(world_size, parity.run, optimizer)


def test_first_forward_is_equal_bit_for_bit(world_size: int, optimizer: str) -> None:
    assert all(result["forward_equal"] for result in results(world_size, optimizer))


def test_lengths_are_those_of_the_batch(world_size: int, optimizer: str) -> None:
    assert all(result["lengths_equal"] for result in results(world_size, optimizer))


def test_rows_after_training(world_size: int, optimizer: str) -> None:
    result = results(world_size, optimizer)[0]
    assert set(result["errors"]) >= set(parity.DYNAMIC)
    assert max(result["errors"].values()) < tolerances.TRAINED_ROW_RTOL, result["errors"]
    # The comparison says something: training has changed at least a quarter of the rows of each table.
    assert min(result["changed"].values()) > 0.25, result["changed"]


def test_fused_params_with_dedup_equal_optimizer_in_backward_without(world_size: int, optimizer: str) -> None:
    """Ids of dynamic tables are deduplicated either way, so not even a rounding differs."""
    result = results(world_size, optimizer)[0]
    assert all(result["models_equal"][name] for name in parity.DYNAMIC), result["models_equal"]
