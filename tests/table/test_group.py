"""Groups of tables: growth, lookups that overlap, refused keys, several tables with different initializers."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from dynamicemb import ConfigError, DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, OptimizerKind
from dynamicemb.table.config import TableConfig
from dynamicemb.table.function import expand, lookup
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig

CPU = torch.device("cpu")
DIM = 4
SGD = OptimizerConfig(OptimizerKind.SGD, learning_rate=1.0)
DEBUG = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.DEBUG)
NORMAL = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL)


def config(**changes) -> TableConfig:
    defaults = {"initializer": DEBUG, "optimizer": SGD, "bucket_capacity": 8, "name": "items", "dim": DIM}
    return TableConfig(**{**defaults, "max_capacity": 64, "init_capacity": 64, **changes})


def look_up(group: TableGroup, keys, table: int = 0, training: bool = True) -> torch.Tensor:
    keys = torch.as_tensor(keys, dtype=torch.int64)
    anchor = torch.empty(0, requires_grad=True)
    return lookup(group, anchor, keys, torch.full((keys.numel(),), table, dtype=torch.int32), None, training)


def rows_by_key(group: TableGroup, table: int = 0) -> dict[int, list[float]]:
    stored = group.stored_rows(table)
    return dict(zip(stored.keys.tolist(), stored.embeddings.float().tolist(), strict=True))


class TestGrowth:
    KEYS = torch.arange(3000) * 977 - 10**6

    def tables(self) -> tuple[TableGroup, TableGroup]:
        full = config(max_capacity=8000, init_capacity=8000, bucket_capacity=128, initializer=NORMAL)
        return TableGroup([full], 1, CPU), TableGroup([dataclasses.replace(full, init_capacity=200)], 1, CPU)

    def test_a_table_that_grew_holds_what_one_of_full_size_holds(self):
        full, growing = self.tables()
        for batch in self.KEYS.split(150):
            for group in (full, growing):
                look_up(group, batch).sum().backward()
        expected, actual = full.stored_rows(0), growing.stored_rows(0)
        assert torch.equal(actual.keys, expected.keys)
        assert torch.equal(actual.scores, expected.scores)
        assert torch.equal(actual.embeddings, expected.embeddings)
        assert sorted(actual.keys.tolist()) == sorted(self.KEYS.tolist())

    def test_growth_follows_the_load_factor_and_stops_at_the_capacity(self):
        _, group = self.tables()
        slots = [group.storage.geometries[0].slots]
        for batch in self.KEYS.split(150):
            look_up(group, batch)
            size, now = group.counters()[0].size, group.storage.geometries[0].slots
            assert size <= 0.5 * now, "the table should have grown before the batch was inserted"
            assert now == slots[-1] or size > 0.5 * slots[-1], "the table grew too early"
            slots.append(now)
        assert slots[0] == 256  # the smallest size on the way to 63 buckets that holds 200 rows
        assert slots[-1] == 8064
        assert not group.storage.geometries[0].can_grow

    def test_a_table_is_asked_for_its_size_only_when_it_could_be_too_full(self, monkeypatch):
        """Repeated keys use up the bound of what the table may hold; what it really holds takes the bound's place."""
        group = TableGroup([config(max_capacity=4096, init_capacity=1024)], 1, CPU)
        asked, sizes = [], group._sizes
        monkeypatch.setattr(group, "_sizes", lambda: asked.append(None) or sizes())
        counts = []
        for _ in range(14):
            look_up(group, range(100))
            counts.append(len(asked))
        # 512 rows are the limit of 1024 slots: the sixth and the eleventh batch of 100 could pass it; 100 rows do not.
        assert counts == [0] * 5 + [1] * 5 + [2] * 4

    def test_a_table_that_was_restored_grows_in_time(self):
        group = TableGroup([config(max_capacity=64, init_capacity=16)], 1, CPU)
        look_up(group, range(8))
        group.restore(0, group.progress(0), rows=8)
        look_up(group, range(100, 104))
        assert group.storage.geometries[0].slots == 32

    def test_growth_is_announced(self, caplog):
        _, group = self.tables()
        with caplog.at_level(logging.INFO, logger="dynamicemb"):
            look_up(group, self.KEYS[:600])
        assert "table 'items' grew from 256 to 512 slots (8064 at most)" in caplog.text

    def test_memory_is_what_the_slots_need(self):
        full, growing = self.tables()
        row_bytes = full.storage.layout.row_bytes
        assert METADATA_BYTES_PER_SLOT == 17
        for batch in self.KEYS.split(500):
            look_up(growing, batch)
            slots = growing.storage.geometries[0].slots
            assert growing.storage.num_bytes == slots * (17 + row_bytes)
        assert full.storage.num_bytes == 8064 * (17 + row_bytes)

    def test_one_batch_can_double_a_table_many_times(self):
        _, group = self.tables()
        look_up(group, self.KEYS)
        assert group.counters()[0].size == len(self.KEYS)
        assert group.counters()[0].refused == 0

    def test_only_the_table_that_is_full_grows(self):
        growing = config(max_capacity=8000, init_capacity=128, bucket_capacity=128)
        group = TableGroup([growing, dataclasses.replace(growing, name="other")], 1, CPU)
        look_up(group, self.KEYS[:100], table=1)
        assert [size.slots for size in group.storage.geometries] == [128, 256]


class TestOverlap:
    def test_a_second_lookup_may_come_before_the_first_backward(self):
        group = TableGroup([config()], 1, CPU)
        first, second = look_up(group, [1, 2]), look_up(group, [2, 3])
        first.backward(torch.ones_like(first))
        second.backward(torch.full_like(second, 10.0))
        assert rows_by_key(group) == {1: [0.0] * DIM, 2: [-9.0] * DIM, 3: [-7.0] * DIM}

    def test_growth_in_between_does_not_misplace_an_update(self):
        group = TableGroup([config(max_capacity=8192, init_capacity=128, bucket_capacity=128)], 1, CPU)
        first = look_up(group, [1, 2, 3])
        look_up(group, range(100, 600))
        first.backward(torch.ones_like(first))
        rows = rows_by_key(group)
        assert [rows[key] for key in (1, 2, 3)] == [[0.0] * DIM, [1.0] * DIM, [2.0] * DIM]
        assert all(rows[key] == [float(key)] * DIM for key in range(100, 600))

    def test_a_row_evicted_in_between_takes_no_update(self):
        group = TableGroup([config(max_capacity=8, init_capacity=8)], 1, CPU)
        first = look_up(group, range(8))
        look_up(group, range(100, 108))
        first.backward(torch.ones_like(first))
        assert rows_by_key(group) == {key: [float(key)] * DIM for key in range(100, 108)}

    def test_a_backward_pass_may_be_repeated(self):
        group = TableGroup([config()], 1, CPU)
        rows = look_up(group, [5])
        for _ in range(2):
            rows.backward(torch.ones_like(rows), retain_graph=True)
        assert rows_by_key(group) == {5: [3.0] * DIM}


class TestRefusedKeys:
    def test_they_read_as_zeros_and_take_no_update(self):
        group = TableGroup([config(max_capacity=8, init_capacity=8)], 1, CPU)
        rows = look_up(group, range(1, 13))
        refused = (rows == 0).all(dim=1)
        assert refused.sum() == 4
        rows.backward(torch.ones_like(rows))
        kept = [key for key, lost in zip(range(1, 13), refused.tolist(), strict=True) if not lost]
        assert rows_by_key(group) == {key: [key - 1.0] * DIM for key in kept}
        counters = group.counters()[0]
        assert (counters.size, counters.misses, counters.refused, counters.evicted) == (8, 12, 4, 0)
        assert group.refused().tolist() == [4]

    def test_keys_of_the_batch_are_never_evicted_by_it(self):
        group = TableGroup([config(max_capacity=8, init_capacity=8)], 1, CPU)
        look_up(group, range(8))
        look_up(group, [0, 1, 2, 3, 100, 101, 102, 103, 104, 105])
        kept = set(rows_by_key(group))
        assert {0, 1, 2, 3} < kept
        assert len(kept & {100, 101, 102, 103, 104, 105}) == 4


class TestTablesOfOneGroup:
    def test_each_keeps_its_initializer_seed_and_learning_rate(self):
        configs = [
            config(name="a", initializer=DEBUG),
            config(name="b", initializer=NORMAL, seed=3, optimizer=dataclasses.replace(SGD, learning_rate=0.5)),
            config(name="c", initializer=dataclasses.replace(NORMAL, mean=100.0), max_capacity=8, init_capacity=8),
        ]
        together = TableGroup(configs, 1, CPU)
        alone = [TableGroup([one], 1, CPU) for one in configs]
        keys, tables = torch.tensor([1, 1, 1, 2, -7, 1]), torch.tensor([0, 1, 2, 1, 2, 1], dtype=torch.int32)
        for _ in range(3):
            rows = lookup(together, torch.empty(0, requires_grad=True), keys, tables, None, True)
            rows.backward(torch.ones_like(rows))
            for table, group in enumerate(alone):
                own = look_up(group, keys[tables == table])
                own.backward(torch.ones_like(own))
        for table, group in enumerate(alone):
            assert rows_by_key(together, table) == rows_by_key(group)
        assert rows_by_key(together, 0)[1] == [-2.0] * DIM

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_each_reads_absent_keys_as_its_own_evaluation_value(self, order):
        value = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=5.0)
        pair = [config(name="zeros"), config(name="fives", eval_initializer=value)]
        group = TableGroup([pair[place] for place in order], 1, CPU)
        for table, place in enumerate(order):
            assert look_up(group, [7], table, training=False).tolist() == [[(0.0, 5.0)[place]] * DIM]

    def test_a_changed_learning_rate_is_that_of_its_table(self):
        group = TableGroup([config(name="a"), config(name="b")], 1, CPU)
        group.set_learning_rate(1, 0.25)
        for table in (0, 1):
            rows = look_up(group, [8], table)
            rows.backward(torch.ones_like(rows))
        assert rows_by_key(group, 0) == {8: [7.0] * DIM}
        assert rows_by_key(group, 1) == {8: [7.75] * DIM}

    def test_each_takes_the_steps_that_it_is_to_take(self):
        group = TableGroup([config(name="a"), config(name="b")], 1, CPU)
        keys, tables = torch.tensor([8, 8]), torch.tensor([0, 1], dtype=torch.int32)
        trained = [[False, True], [True, False], None, [True, False], [False, True], [False, False], [True, True]]
        for choice in trained:
            rows, found = group.train_lookup(keys, tables)
            group.apply_gradients(found, torch.ones_like(rows), choice)
        steps = [sum(choice is None or choice[table] for choice in trained) for table in (0, 1)]
        assert group.steps.tolist() == steps
        assert [rows_by_key(group, table) for table in (0, 1)] == [{8: [8.0 - count] * DIM} for count in steps]

    def test_tables_of_different_layouts_cannot_share_a_group(self):
        with pytest.raises(ConfigError, match="cannot share a group"):
            TableGroup([config(), config(dim=8)], 1, CPU)


class TestScores:
    def test_counts_of_entries_are_what_lfu_counts(self):
        group = TableGroup([config(evict_strategy=DynamicEmbEvictStrategy.LFU)], 1, CPU)
        keys, tables = torch.tensor([4, 5, 4]), torch.zeros(3, dtype=torch.int32)
        group.train_lookup(keys, tables, torch.tensor([10, 1, 100]))
        group.train_lookup(keys, tables)
        stored = group.stored_rows(0)
        assert dict(zip(stored.keys.tolist(), stored.scores.tolist(), strict=True)) == {4: 112, 5: 2}

    def test_evaluation_changes_nothing(self):
        group = TableGroup([config(eval_initializer=DEBUG)], 1, CPU)
        look_up(group, [1, 2])
        before, counters = group.stored_rows(0), group.counters()
        rows = look_up(group, [1, 9, 9], training=False)
        assert rows.tolist() == [[1.0] * DIM, [9.0] * DIM, [9.0] * DIM]
        assert not rows.requires_grad
        after = group.stored_rows(0)
        assert torch.equal(after.keys, before.keys)
        assert torch.equal(after.scores, before.scores)
        assert group.counters() == counters
        assert group.clock.tolist() == [1]


def test_an_empty_batch_is_an_ordinary_one():
    group = TableGroup([config()], 1, CPU)
    rows = look_up(group, [])
    assert rows.shape == (0, DIM)
    rows.backward(torch.empty(0, DIM))
    assert look_up(group, [], training=False).shape == (0, DIM)
    assert group.counters()[0].size == 0
    assert group.clock.tolist() == group.steps.tolist() == [1]


def test_expand_sums_gradients_in_batch_order():
    group = TableGroup([config()], 1, CPU)
    _, found = group.train_lookup(torch.tensor([3, 4, 3, 3]), torch.zeros(4, dtype=torch.int32))
    rows = torch.randn(2, 3, requires_grad=True)
    expanded = expand(rows, found.unique)
    assert torch.equal(expanded, rows[found.unique.inverse])
    gradients = torch.tensor([[1e8], [5.0], [1.0], [-1e8]]).expand(4, 3)
    expanded.backward(gradients)
    assert rows.grad is not None
    place = int(found.unique.inverse[0])
    # (1e8 + 1) - 1e8 is 0 in float32: the order decides.
    assert rows.grad[place].tolist() == [0.0] * 3
    assert rows.grad[1 - place].tolist() == [5.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_expanded_rows_have_their_dtype(dtype):
    """They are summed in float32 and converted once: in 16 bits, the small ones would be lost one by one."""
    group = TableGroup([config()], 1, CPU)
    _, found = group.train_lookup(torch.full((513,), 3), torch.zeros(513, dtype=torch.int32))
    leaf, seen = torch.zeros(1, 4, dtype=dtype, requires_grad=True), []
    rows = leaf * 1
    rows.register_hook(seen.append)
    gradients = torch.full((513, 4), 2.0**-12, dtype=dtype)
    gradients[0] = 1
    expand(rows, found.unique).backward(gradients)
    assert [gradient.dtype for gradient in seen] == [dtype]
    assert leaf.grad is not None and leaf.grad.tolist() == [[1.125] * 4]
