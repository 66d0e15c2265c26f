"""Batches drawn on the device, and the tables that are filled with them."""

from __future__ import annotations

import pytest
import torch
from gpu.full_table import FullTable
from gpu.ids import Batch, IdSource, count_unique
from gpu.tables import DynamicTables

from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig

CPU = torch.device("cpu")


def test_popular_ids_come_often_and_differ_between_tables() -> None:
    batch = IdSource(2, 1000, CPU).power_law(20_000)
    assert batch.tables.tolist() == [0] * 20_000 + [1] * 20_000
    most = []
    for ids in batch.ids.view(2, -1):
        assert int(ids.min()) >= 0 and int(ids.max()) < 1000
        counts = ids.bincount(minlength=1000)
        # The share of [1, 2) under the density x**-1.05 on [1, 1001).
        assert counts.max().item() / 20_000 == pytest.approx((1 - 2**-0.05) / (1 - 1001**-0.05), rel=0.1)
        most.append(int(counts.argmax()))
    assert most[0] != most[1]


def test_uniform_ids_are_all_alike() -> None:
    counts = IdSource(1, 100, CPU).uniform(50_000).ids.bincount(minlength=100)
    assert counts.min() > 350 and counts.max() < 650


def test_distinct_ids_are_counted_for_each_table() -> None:
    tables = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    assert count_unique(Batch(torch.tensor([5, 5, 6, 5]), tables)) == 3


def test_every_id_gets_a_place() -> None:
    source = IdSource(3, 700, CPU)
    tables = DynamicTables(3, 700, 8, OptimizerConfig(OptimizerKind.SGD), CPU)
    tables.insert_every(source, 1000)
    assert tables.misplaced() == 0
    assert [counters.size for counters in tables.group.counters()] == [700] * 3
    assert tables.buckets == 3 * 10  # 700 rows are 60 % of 9.1 buckets of 128


@pytest.mark.parametrize("load", [0.5, 0.75, 1.0])
def test_a_table_is_filled_to_its_load(load: float) -> None:
    table = FullTable(1 << 14, 8, 4096, CPU)
    table.fill_to(load)
    assert table.load == pytest.approx(load, abs=0.01)
    keys, slots = table.present(500)
    assert keys.unique().numel() == slots.unique().numel() == 500
    assert not torch.isin(table.fresh(500), table.chunk.keys[table.chunk.digests != 0]).any()


def test_a_table_comes_back_as_it_was() -> None:
    table = FullTable(1 << 12, 8, 512, CPU)
    table.fill_to(0.5)
    table.save()
    before = [tensor.clone() for tensor in table._metadata()]
    unique = table.distinct(table.fresh(100))
    table.find_or_insert(unique, table.scores(), rows=True)
    assert not torch.equal(table.chunk.digests, before[0])
    table.restore()
    assert all(torch.equal(now, then) for now, then in zip(table._metadata(), before))
