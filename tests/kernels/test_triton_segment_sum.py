"""Sums of duplicates on the Triton engine."""

from __future__ import annotations

import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.views import UniqueKeys
from tests.kernels.group_state import both_engines
from tests.kernels.keys import EXTREME_KEYS
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


def batch(size: int, distinct: int, tables: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``size`` draws from ``distinct`` keys in ``tables`` tables."""
    generator = torch.Generator().manual_seed(size + tables)
    pool = torch.randint(-(2**63), 2**63 - 1, (distinct,), generator=generator)
    pool[: len(EXTREME_KEYS)] = torch.tensor(EXTREME_KEYS)[:distinct]
    keys = pool[torch.randint(0, distinct, (size,), generator=generator)]
    return keys, torch.randint(0, tables, (size,), generator=generator, dtype=torch.int32)


def both_unique(keys: torch.Tensor, tables: torch.Tensor) -> tuple[UniqueKeys, UniqueKeys]:
    return both_engines(dedup, keys, tables, 4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [4, 20, 1024])
def test_float_sums_agree_to_the_bit(dtype: torch.dtype, columns: int) -> None:
    keys, tables = batch(120, 12, 4)
    keys[:50] = 7  # the loop that has 16 rows in flight
    tables[:50] = 2
    values = torch.randn(120, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    unique, _ = both_unique(keys, tables)
    expected, actual = both_engines(segment_sum, values, unique)
    assert expected.dtype == actual.dtype == torch.float32
    assert torch.equal(actual.cpu(), expected)


def test_sums_follow_the_batch_order() -> None:
    """2**24 + 1 + 1 - 2**24 in float32 depends on the order."""
    values = torch.tensor([[2.0**24], [1.0], [1.0], [-(2.0**24)]]).repeat(1, 4)
    for order in ([0, 1, 2, 3], [1, 2, 0, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        unique, _ = both_unique(torch.full((4,), 5), torch.zeros(4, dtype=torch.int32))
        expected, actual = both_engines(segment_sum, values[order], unique)
        assert torch.equal(actual.cpu(), expected)


def test_integer_sums_agree_and_wrap() -> None:
    keys, tables = batch(1300, 40, 4)
    values = torch.randint(-(2**63), 2**63 - 1, (1300,), generator=torch.Generator().manual_seed(1))
    unique, padded = both_unique(keys, tables)
    expected, actual = both_engines(segment_sum, values, unique)
    assert torch.equal(actual.cpu(), expected)
    with engine("triton"):
        actual = segment_sum(values.to(DEVICE), padded)  # as in a step: the length of the batch, the count in memory
    assert torch.equal(actual[: int(unique.count)].cpu(), expected)


def test_sums_of_an_empty_batch() -> None:
    unique, _ = both_unique(*batch(0, 1, 1))
    for values in (torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)):
        expected, actual = both_engines(segment_sum, values, unique)
        assert actual.shape == expected.shape


@pytest.mark.parametrize("counts", [[127, 1, 128], [129, 128, 256], [1, 255, 2, 257, 5, 300], [900], [128], [384, 384]])
@pytest.mark.parametrize("columns", [4, 20])
def test_blocks_of_frequent_keys(counts: list[int], columns: int) -> None:
    """At every place beside windows of 128 sorted positions. Magnitudes over eight decades: in another order the sums
    have other bits."""
    generator = torch.Generator().manual_seed(sum(counts))
    keys = torch.repeat_interleave(torch.arange(len(counts)) * 77, torch.tensor(counts))
    keys = keys[torch.randperm(len(keys), generator=generator)]
    scale = 10.0 ** torch.randint(-4, 4, (len(keys), 1), generator=generator)
    values = torch.randn(len(keys), columns, generator=generator) * scale
    unique, padded = both_unique(keys, torch.zeros(len(keys), dtype=torch.int32))
    expected, _ = both_engines(segment_sum, values, unique)
    with engine("triton"):
        actual = segment_sum(values.to(DEVICE), padded)
    assert torch.equal(actual[: len(counts)].cpu(), expected)
