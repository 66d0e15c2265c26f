"""Bytes of rows, sizes of tables, and the chunks that doublings leave behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamicemb.kernels.layout import (
    MAX_CHUNKS,
    METADATA_BYTES_PER_SLOT,
    ROW_ALIGNMENT_BYTES,
    OptimizerKind,
    RowLayout,
    TableGeometry,
    buckets_for,
    optimizer_states,
    table_bytes,
)
from tests import oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_optimizer_states_by_kind() -> None:
    states = {kind: [(s.name, s.width, s.offset) for s in optimizer_states(kind, 20)] for kind in OptimizerKind}
    assert states == {
        OptimizerKind.SGD: [],
        OptimizerKind.ADAGRAD: [("sum", 20, 0)],
        OptimizerKind.ROWWISE_ADAGRAD: [("sum", 1, 0)],
        OptimizerKind.ADAM: [("exp_avg", 20, 0), ("exp_avg_sq", 20, 20)],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("dim", [4, 8, 12, 20, 64, 100, 128, 1024])
def test_rows_are_aligned_and_tight(dim: int, kind: OptimizerKind, dtype: torch.dtype) -> None:
    layout = RowLayout(dim, dtype, kind)
    embedding_bytes = dim * dtype.itemsize
    state_bytes = 4 * layout.state_width
    assert layout.state_offset_bytes % ROW_ALIGNMENT_BYTES == 0
    assert layout.row_bytes % ROW_ALIGNMENT_BYTES == 0
    assert 0 <= layout.state_offset_bytes - embedding_bytes < ROW_ALIGNMENT_BYTES
    assert 0 <= layout.row_bytes - layout.state_offset_bytes - state_bytes < ROW_ALIGNMENT_BYTES
    ends = [state.offset + state.width for state in layout.states]
    assert [state.offset for state in layout.states] == [0, *ends][: len(ends)]
    assert layout.state_width == max(ends, default=0)


@pytest.mark.parametrize(
    ("dim", "dtype", "kind", "row_bytes"),
    [
        (4, torch.float32, OptimizerKind.SGD, 16),
        (4, torch.float16, OptimizerKind.SGD, 16),
        (20, torch.bfloat16, OptimizerKind.ADAM, 48 + 160),
        (64, torch.float32, OptimizerKind.ROWWISE_ADAGRAD, 256 + 16),
        (128, torch.float32, OptimizerKind.ADAGRAD, 1024),
    ],
)
def test_row_bytes_by_hand(dim: int, dtype: torch.dtype, kind: OptimizerKind, row_bytes: int) -> None:
    assert RowLayout(dim, dtype, kind).row_bytes == row_bytes


def test_metadata_is_at_most_17_bytes_per_slot() -> None:
    assert METADATA_BYTES_PER_SLOT <= 17
    layout = RowLayout(64, torch.float32, OptimizerKind.ADAGRAD)
    assert table_bytes(1000, 128, layout) == 1024 * (17 + 512)
    assert table_bytes(1, 8, layout) == 8 * (17 + 512)


@pytest.mark.parametrize(("rows", "buckets"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_buckets_for(rows: int, buckets: int) -> None:
    assert buckets_for(rows, 8) == buckets


def reachable_sizes(max_buckets: int) -> list[int]:
    """Buckets of every table from which doubling leads to exactly ``max_buckets``, least last."""
    sizes = [max_buckets]
    while sizes[-1] > 1 and len(sizes) < MAX_CHUNKS:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


@given(max_rows=st.integers(1, 3000), init_rows=st.integers(1, 3000), capacity=st.sampled_from([8, 16, 128]))
def test_create_takes_the_smallest_size_that_holds_the_rows(max_rows: int, init_rows: int, capacity: int) -> None:
    geometry = TableGeometry.create(max_rows, min(init_rows, max_rows), capacity)
    assert geometry.max_slots >= max_rows > geometry.max_slots - capacity
    holding = [size for size in reachable_sizes(geometry.max_buckets) if size * capacity >= min(init_rows, max_rows)]
    assert geometry.buckets == holding[-1]
    assert geometry.slots == geometry.buckets * capacity
    assert geometry.levels == 0


@pytest.mark.parametrize("max_buckets", [1, 2, 3, 5, 6, 7, 8, 11, 12, 37, 64, 100])
def test_doublings_end_at_full_size_and_chunks_hold_every_bucket_once(max_buckets: int) -> None:
    geometry = TableGeometry.create(max_buckets * 8, 8, 8)
    model = oracle.TableModel(max_buckets * 8, 8, 8, index=3)
    while True:
        assert geometry.buckets == model.buckets
        chunks = [geometry.chunk_buckets(chunk) for chunk in range(geometry.levels + 1)]
        assert sum(chunks) == geometry.buckets and min(chunks) > 0
        first_chunk = 3 * MAX_CHUNKS
        expected = {((first_chunk + c) << 40) + 8 * index for c, size in enumerate(chunks) for index in range(size)}
        assert {model.handle(bucket, 0) for bucket in range(model.buckets)} == expected
        if not geometry.can_grow:
            break
        geometry = geometry.doubled()
        model.grow()
    assert geometry.buckets == geometry.max_buckets == max_buckets
    assert not model.can_grow


def test_growth_is_bounded_by_the_chunks_of_a_table() -> None:
    geometry = TableGeometry.create(2**45, 1, 8)
    assert geometry.shift == MAX_CHUNKS - 1
    assert geometry.buckets == 2 ** (42 - 31)


def test_a_table_of_full_size_cannot_grow() -> None:
    geometry = TableGeometry.create(1000, 1000, 8)
    assert not geometry.can_grow
    with pytest.raises(AssertionError):
        geometry.doubled()
