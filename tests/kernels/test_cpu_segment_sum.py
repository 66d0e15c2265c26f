"""Sums of duplicates on the CPU engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.views import UniqueKeys
from tests import oracle_values
from tests.kernels.paired import distinct, int64

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def summed(values: torch.Tensor, unique: UniqueKeys) -> torch.Tensor:
    """Sums as the contract has them, from the rows of each key."""
    rows, inverse = values.float().numpy(), unique.inverse.numpy()
    sums = [oracle_values.block_sum(rows[inverse == entry]) for entry in range(unique.keys.numel())]
    return torch.from_numpy(np.stack(sums))


def test_a_long_batch_in_two_threads(two_threads: None) -> None:
    generator = torch.Generator().manual_seed(5)
    keys = torch.randint(0, 3000, (50_000,), generator=generator).clamp(min=1000)
    unique = dedup(keys, torch.zeros(50_000, dtype=torch.int32), 1, 1)
    gradients = torch.randn(50_000, 4, generator=generator)
    assert torch.equal(segment_sum(gradients, unique), summed(gradients, unique))


@pytest.mark.parametrize("count", [1, 127, 128, 129, 255, 256, 257, 1000])
def test_blocks_of_a_frequent_key(count: int) -> None:
    """Between two others. Magnitudes over eight decades: the sum in another order has other bits."""
    generator = torch.Generator().manual_seed(count)
    keys = torch.cat([torch.full((count,), 7), torch.tensor([1, 2, 1, 9])])
    keys = keys[torch.randperm(len(keys), generator=generator)]
    values = torch.randn(len(keys), 8, generator=generator) * 10.0 ** torch.randint(
        -4, 4, (len(keys), 1), generator=generator
    )
    unique = distinct(keys.tolist())
    sums = segment_sum(values, unique)
    assert torch.equal(sums, summed(values, unique))
    entry = unique.keys.tolist().index(7)
    one_by_one = np.add.accumulate(values.numpy()[keys.numpy() == 7], axis=0, dtype=np.float32)[-1]
    assert np.array_equal(sums[entry].numpy(), one_by_one) == (count < 256)  # one block, then rows, is one sum


def test_blocks_round_less_than_one_long_sum() -> None:
    values = torch.rand(100_000, 4, generator=torch.Generator().manual_seed(0))
    exact = values.double().sum(0)
    one_by_one = torch.from_numpy(np.add.accumulate(values.numpy(), axis=0, dtype=np.float32)[-1])
    error = (segment_sum(values, distinct([3] * 100_000))[0] - exact).abs().max()
    assert error < 0.2 * (one_by_one - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 4, 20, 64, 1028, 2500])
def test_sums_are_float32_sums_in_batch_order(dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    keys = torch.randint(0, 20, (400,), generator=generator)
    unique = distinct(keys.tolist(), world_size=3)
    # Magnitudes over eight decades: almost any other order of summation gives other bits.
    scale = 10.0 ** torch.randint(-4, 4, (400, 1), generator=generator)
    values = (torch.randn(400, dim, generator=generator) * scale).to(dtype)
    sums = segment_sum(values, unique)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, summed(values, unique))
    assert not torch.equal(sums, summed(values.flip(0), distinct(keys.flip(0).tolist(), world_size=3)))


def test_half_precision_values_are_summed_in_float32() -> None:
    values = torch.ones(5000, 4, dtype=torch.float16)  # float16 stops counting at 2048
    assert segment_sum(values, distinct([9] * 5000)).tolist() == [[5000.0] * 4]


def test_sums_of_integers_are_exact() -> None:
    unique = distinct([5, -1, 5, 5, -1])
    values = int64([2**53, 7, 1, 2**62, -(2**63)])
    sums = dict(zip(unique.keys.tolist(), segment_sum(values, unique).tolist()))
    assert sums == {5: 2**53 + 1 + 2**62, -1: 7 - 2**63}


def test_sums_of_strided_values() -> None:
    unique = distinct([1, 2, 1])
    values = torch.arange(24.0).reshape(8, 3).t()
    assert torch.equal(segment_sum(values, unique), summed(values, unique))


def test_sums_of_nothing() -> None:
    unique = distinct([])
    assert segment_sum(torch.empty(0, 8), unique).shape == (0, 8)
    assert segment_sum(int64([]), unique).shape == (0,)
