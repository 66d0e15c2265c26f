"""Rows out of the table on the CPU engine: exact copies and exact conversions."""

from __future__ import annotations

import pytest
import torch

from dynamicemb.kernels.gather import gather, gather_rows
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import int64

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (4, 8, 20, 64, 128, 1024)


def memory_of(
    dim: int, dtype: torch.dtype, kind: OptimizerKind, seed: int = 0
) -> tuple[GroupMemory, torch.Tensor, torch.Tensor]:
    """Two tables of two and three chunks with random rows; the handles of all slots; and their rows."""
    memory = GroupMemory([TableGeometry.create(64, 16, 8), TableGeometry.create(64, 8, 8)], RowLayout(dim, dtype, kind))
    memory.grow(0)
    memory.grow(1)
    memory.grow(1)
    slots = int64(
        ((table * 32 + number) << 40) + index
        for table, chunks in enumerate(memory.chunks)
        for number, chunk in enumerate(chunks)
        for index in range(len(chunk.digests))
    )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(slots), dim, generator=generator).to(dtype)
    memory.write(slots, rows, torch.randn(len(slots), memory.layout.state_width, generator=generator))
    return memory, slots, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("dim", DIMS)
def test_rows_in_any_order(dim: int, kind: OptimizerKind, dtype: torch.dtype) -> None:
    memory, slots, rows = memory_of(dim, dtype, kind)
    before = memory.snapshot()
    inverse = torch.randint(0, len(slots), (300,), generator=torch.Generator().manual_seed(1))
    out = gather(memory.view, slots, inverse)
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert torch.equal(out, rows.float()[inverse])
    assert not memory.changed_since(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_and_refused_keys_read_as_zeros(dtype: torch.dtype) -> None:
    memory, slots, rows = memory_of(20, dtype, OptimizerKind.ADAM)
    slots[::2] = -1
    expected = rows.float()
    expected[::2] = 0
    assert torch.equal(gather(memory.view, slots, torch.arange(len(slots))), expected)
    only_absent = gather(memory.view, int64([-1]), int64([0, 0, 0]))
    assert only_absent.tolist() == [[0.0] * 20] * 3


def test_nothing() -> None:
    memory, slots, _ = memory_of(8, torch.float32, OptimizerKind.SGD)
    assert gather(memory.view, slots, int64([])).shape == (0, 8)
    assert gather(memory.view, int64([]), int64([])).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_of_16_bits_converts_as_in_torch(dtype: torch.dtype) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(64, 1024)
    memory = GroupMemory([TableGeometry.create(64, 64, 64)], RowLayout(1024, dtype, OptimizerKind.SGD))
    memory.write(torch.arange(64), patterns, torch.empty(64, 0))
    out = gather(memory.view, torch.arange(64), torch.arange(64))
    numbers = ~patterns.isnan()
    assert torch.equal(out.view(torch.int32)[numbers], patterns.float().view(torch.int32)[numbers])
    assert torch.equal(out.isnan(), ~numbers)


def test_many_rows_in_two_threads(two_threads: None) -> None:
    memory, slots, rows = memory_of(8, torch.float32, OptimizerKind.SGD)
    inverse = torch.arange(20_000) * 7919 % len(slots)
    assert torch.equal(gather(memory.view, slots, inverse), rows[inverse])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, *DIMS])
def test_rows_of_a_tensor_are_those_of_index_select(dim: int, dtype: torch.dtype) -> None:
    """Copied as they are, NaN included; the 1,024 columns make a result of several huge pages."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(70, dim, generator=generator).to(dtype)
    rows[3] = torch.nan
    inverse = torch.randint(0, 70, (3000,), generator=generator)
    out = gather_rows(rows, inverse)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out.view(torch.uint8), rows.index_select(0, inverse).view(torch.uint8))


def test_rows_of_a_tensor_in_two_threads(two_threads: None) -> None:
    rows = torch.arange(7 * 64.0).view(7, 64)
    inverse = torch.arange(20_000) * 7919 % 7
    assert torch.equal(gather_rows(rows, inverse), rows.index_select(0, inverse))


def test_rows_of_a_tensor_that_is_a_part_of_another() -> None:
    rows = torch.randn(8, 40)[1::2, 3:23]
    assert torch.equal(gather_rows(rows, int64([3, 0, 0])), rows[[3, 0, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_of_a_tensor(rows: int, dtype: torch.dtype) -> None:
    out = gather_rows(torch.empty(rows, 8, dtype=dtype), int64([]))
    assert out.shape == (0, 8) and out.dtype == dtype
