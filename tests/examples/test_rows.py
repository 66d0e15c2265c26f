"""Reading ranges of a log that is decoded chunk by chunk, and cutting it into batches and shares."""

from __future__ import annotations

import pytest
import torch
from batches import BatchMaker
from rows import CATEGORICAL, Chunk, RowRange, Rows, RowSource, split_tail


def _rows(start: int, stop: int) -> Rows:
    """Rows whose ids are 100 times their number, plus the feature; feature c2 is null in every third row."""
    number = torch.arange(start, stop)
    present = torch.ones(stop - start, 26, dtype=torch.bool)
    present[number % 3 == 0, 1] = False
    ids = (number[:, None] * 100 + torch.arange(26)) * present
    return Rows((number % 2).float(), number[:, None].expand(-1, 13).float() - 1, ids, present)


def _source(chunk_rows: list[int], decoded: list[int]) -> RowSource:
    def load(index: int, start: int, count: int) -> Rows:
        decoded.append(index)
        return _rows(start, start + count)

    starts = [sum(chunk_rows[:index]) for index in range(len(chunk_rows))]
    return RowSource(
        [
            Chunk(count, lambda index=index, start=start, count=count: load(index, start, count))
            for index, (start, count) in enumerate(zip(starts, chunk_rows, strict=True))
        ]
    )


@pytest.mark.parametrize("chunk_rows", [[10], [3, 4, 3], [1] * 10, [0, 5, 0, 0, 5, 0]])
def test_any_range(chunk_rows):
    for start in range(11):
        for stop in range(start, 11):
            rows = _source(chunk_rows, []).read(start, stop)
            assert torch.equal(rows.ids, _rows(start, stop).ids)
            assert torch.equal(rows.dense, _rows(start, stop).dense)


def test_ascending_ranges_decode_each_chunk_once():
    decoded: list[int] = []
    source = _source([4, 4, 2], decoded)
    for start in range(0, 10, 3):
        source.read(start, min(start + 3, 10))
    assert decoded == [0, 1, 2]


def test_the_last_tenth_is_held_out():
    for total, held_out in ((2, 1), (10, 1), (11, 2), (100, 10)):
        training, tail = split_tail(_source([total], []))
        assert (training.start, len(training) + len(tail), tail.stop) == (0, total, total)
        assert (training.stop, len(tail)) == (tail.start, held_out)


def _makers(world_size: int, batch_size: int, **static) -> list[BatchMaker]:
    options = {"static_features": (), "static_rows": 7, **static}
    return [BatchMaker(batch_size, rank, world_size, torch.device("cpu"), **options) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_are_the_batches_cut_in_order(world_size):
    log = RowRange(_source([4, 9], []), 1, 12)
    makers = _makers(world_size, 4)
    by_rank = [list(maker.batches(log)) for maker in makers]
    assert {len(batches) for batches in by_rank} == {makers[0].steps(log)} == {3}
    for step, (start, stop) in enumerate([(1, 5), (5, 9), (9, 12)]):
        shares = [batches[step] for batches in by_rank]
        assert {share.global_rows for share in shares} == {stop - start}
        assert torch.equal(torch.cat([share.labels for share in shares]), _rows(start, stop).labels)
        for feature, name in enumerate(CATEGORICAL):
            ids = torch.cat([share.sparse[name].values() for share in shares])
            expected = _rows(start, stop)
            assert torch.equal(ids, expected.ids[expected.present[:, feature], feature])
            lengths = torch.cat([share.sparse[name].lengths() for share in shares])
            assert torch.equal(lengths, expected.present[:, feature].int())


def test_a_last_batch_that_is_smaller_than_the_ranks():
    log = RowRange(_source([5], []), 0, 5)
    last = [list(maker.batches(log))[-1] for maker in _makers(3, 4)]
    assert sorted(len(share.labels) for share in last) == [0, 0, 1]
    assert all(share.global_rows == 1 for share in last)
    empty = next(share for share in last if len(share.labels) == 0)
    assert empty.sparse.stride() == 0
    assert empty.sparse.keys() == list(CATEGORICAL)


def test_dense_inputs_are_logarithms_and_ids_of_static_tables_are_taken_modulo():
    (maker,) = _makers(1, 8, static_features={"c3"})
    dense = torch.tensor([[-3.0, 0.0, 1.0] + [0.0] * 10])
    row = Rows(torch.ones(1), dense, torch.full((1, 26), -5), torch.ones(1, 26, dtype=torch.bool))
    (batch,) = maker.batches(RowRange(RowSource([Chunk(1, lambda: row)]), 0, 1))
    assert batch.dense[0, :3].tolist() == pytest.approx([0.0, 0.0, 0.6931472])
    assert batch.sparse["c2"].values().tolist() == [-5]
    assert batch.sparse["c3"].values().tolist() == [2]
