"""What a group of tables says has changed since a step, against snapshots of the table after every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.table import change_log
from dynamicemb.table.filling import HostRows, TableFilling
from dynamicemb.table.group import TableGroup
from tests.exploring import examples
from tests.oracle import mix64
from tests.steady_state import META, Step, meta_memory, recorded
from tests.table.groups import DIM, config, group_of, train

LFU, LRU = DynamicEmbEvictStrategy.LFU, DynamicEmbEvictStrategy.LRU
SEEDS = st.integers(0, 2**32)


def batches(seed: int, count: int) -> list[list[tuple[int, int]]]:
    """(table, key) of ``count`` batches: some empty, some with more keys of a bucket than it has slots."""
    numbers = random.Random(seed)
    return [
        [(numbers.randrange(2), numbers.randrange(-20, 20)) for _ in range(numbers.choice((0, 4, 12, 40)))]
        for _ in range(count)
    ]


class Watched:
    """A group of two tables, and what was in them after every training lookup."""

    def __init__(self, strategy: DynamicEmbEvictStrategy, **fields: Any) -> None:
        self.group = group_of(*(config(name, evict_strategy=strategy, **fields) for name in ("a", "b")))
        #: Keys by table after lookup 0, 1, …; the last lookup of each key that is there.
        self.keys: list[list[set[int]]] = [[set(), set()]]
        self.touched: list[dict[int, int]] = [{}, {}]

    def step(self, entries: Sequence[tuple[int, int]], update: bool = True) -> None:
        keys = torch.tensor([key for _, key in entries], dtype=torch.int64)
        tables = torch.tensor([table for table, _ in entries], dtype=torch.int32)
        rows, lookup = self.group.train_lookup(keys, tables)
        if update:
            self.group.apply_gradients(lookup, torch.ones_like(rows))
        self.keys.append([set(self.group.stored_rows(table).keys.tolist()) for table in (0, 1)])
        for table, key in entries:
            if key in self.keys[-1][table]:
                self.touched[table][key] = len(self.keys) - 1

    def assert_known(self, table: int, since: int) -> None:
        changes, now = self.group.changes, self.keys[-1][table]
        selected = changes.touched(table, since, changes.lag)
        runs = self.group.contents(table).runs(5, selected)
        found = [key for run in runs for key in run.keys.tolist()]
        expected = {key for key in now if self.touched[table][key] >= since}
        assert found == sorted(expected, key=mix64)
        survey = changes.survey(table, selected)
        assert (survey.rows, survey.selected) == (len(now), len(expected))
        assert survey.keys_sum == sum(map(mix64, now)) % 2**64
        gone = set().union(*(keys[table] for keys in self.keys[since:])) - now
        assert changes.evicted(table, since).tolist() == sorted(gone, key=mix64)


@settings(max_examples=examples(80), deadline=None)
@given(st.sampled_from(DynamicEmbEvictStrategy), st.booleans(), SEEDS, st.integers(0, 4), st.integers(0, 12))
def test_everything_since_any_step_is_known(
    strategy: DynamicEmbEvictStrategy, grows: bool, seed: int, first: int, steps: int
) -> None:
    """Evictions, also of keys that had come back, refused keys, growth, empty batches."""
    size = {"capacity": 64, "init_capacity": 8} if grows else {"capacity": 16}
    watched = Watched(strategy, **size)
    for number, batch in enumerate(batches(seed, first + steps)):
        if number == first:
            watched.group.changes.begin()
        watched.step(batch)
    watched.group.changes.begin()
    for table in (0, 1):
        assert watched.group.changes.first_step(table) == first
        for since in range(first, len(watched.keys)):
            if strategy is not LRU and since == first:  # touches before the beginning are known by score alone
                watched.touched[table] = {key: step for key, step in watched.touched[table].items() if step > first}
                watched.touched[table] |= dict.fromkeys(watched.keys[-1][table] - set(watched.touched[table]), -1)
            watched.assert_known(table, since)


@settings(max_examples=examples(60), deadline=None)
@given(st.sampled_from(DynamicEmbEvictStrategy), SEEDS, st.integers(1, 60), st.integers(0, 12))
def test_what_no_longer_fits_is_not_claimed_to_be_known(
    strategy: DynamicEmbEvictStrategy, seed: int, size: int, steps: int
) -> None:
    """A ring of a few entries; batches may evict more than that at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change_log, "MIN_REMEMBERED", size)
        patch.setattr(change_log, "MAX_REMEMBERED", size)
        watched = Watched(strategy, capacity=8)
        watched.group.changes.begin()
        steps_of_evictions: list[int] = []
        for number, batch in enumerate(batches(seed, steps), 1):
            watched.step(batch)
            evictions = sum(counters.evicted for counters in watched.group.counters())
            steps_of_evictions += [number] * (evictions - len(steps_of_evictions))
        expected = steps_of_evictions[-size] if len(steps_of_evictions) > size else 0
        for table in (0, 1):
            first = watched.group.changes.first_step(table)
            assert first == expected
            for since in range(first, len(watched.keys)):
                watched.assert_known(table, since)


@pytest.mark.parametrize("strategy", [LRU, LFU])
def test_rows_that_are_updated_late_are_changed(strategy: DynamicEmbEvictStrategy) -> None:
    """By a backward pass after other lookups, or after the beginning."""
    group = group_of(config(evict_strategy=strategy))
    first, second = train(group, [1, 2]), train(group, [3])
    group.changes.begin()
    second.backward(torch.ones_like(second))
    first.backward(torch.ones_like(first))
    train(group, [9])

    def touched(since: int) -> set[int]:
        runs = group.contents(0).runs(8, group.changes.touched(0, since, group.changes.lag))
        return {key for run in runs for key in run.keys.tolist()}

    assert {1, 2, 3, 9} == touched(2)
    train(group, [4])
    late = train(group, [5])
    train(group, [6]), train(group, [7])
    late.backward(torch.ones_like(late))
    train(group, [8]).sum().backward()  # which is not late, and does not hide that another one was
    assert touched(7) >= {5, 7}


def test_a_table_that_is_replaced_begins_anew() -> None:
    """With the clock that it was given; the other table of its group goes on."""
    watched = Watched(LFU, capacity=8)
    group = watched.group
    group.changes.begin()
    for first in range(0, 40, 4):
        watched.step([(table, key) for table in (0, 1) for key in range(first, first + 4)])
    rows = group.contents(0).all()
    group.contents(0).clear(group.configs[0].geometry())
    group.contents(0).insert(rows.keys, rows.scores, rows.embeddings, rows.states)
    progress = group.progress(0)
    group.restore(0, type(progress)(**{**vars(progress), "clock": 1000}), len(rows.keys))
    assert (group.changes.first_step(0), group.changes.first_step(1)) == (1000, 0)
    assert group.changes.survey(0, group.changes.touched(0, 1000, 0)).selected == 0
    assert group.changes.evicted(0, 1000).numel() == 0
    watched.assert_known(1, 3)
    train(group, [77])
    assert group.changes.survey(0, group.changes.touched(0, 1001, 0)).selected == 1
    assert group.changes.evicted(0, 1000).numel() == 1
    assert group.changes.evicted(0, 1001).numel() == 0


@pytest.mark.parametrize("strategy", [LRU, LFU])
def test_an_update_that_comes_after_a_load_is_a_change(strategy: DynamicEmbEvictStrategy) -> None:
    """A backward pass whose lookup came before: the loaded row is another one than the checkpoint has."""
    group = group_of(config(evict_strategy=strategy))
    group.changes.begin()
    rows, loaded = train(group, [1, 2]), torch.tensor([1])
    filling = TableFilling(group, 0, rows=1)
    filling.add(HostRows(loaded, loaded, torch.zeros(1, DIM), {}))
    filling.finish()
    group.restore(0, group.progress(0), filling.kept)
    rows.backward(torch.ones_like(rows))
    clock = int(group.clock[0])
    changes = group.changes
    assert changes.lag == 0
    assert changes.survey(0, changes.touched(0, clock, changes.lag)).selected == 1


@pytest.mark.parametrize("strategy", [LRU, LFU])
def test_changes_are_noted_from_the_load_of_one_of_the_tables_on(strategy: DynamicEmbEvictStrategy) -> None:
    group = group_of(*(config(name, evict_strategy=strategy) for name in ("a", "b")))
    train(group, [1]), train(group, [1], table=1)
    group.restore(0, group.progress(0), 1)
    train(group, [2])
    group.changes.begin()
    assert (group.changes.first_step(0), group.changes.first_step(1)) == (2, 3)
    assert group.changes.survey(0, group.changes.touched(0, 3, 0)).selected == 1


def test_lookups_that_nobody_noted_are_noticed() -> None:
    """Those of a graph that was captured before: the clock moves, and nothing else of what this process sees."""
    group = group_of()
    group.changes.begin()
    train(group, [1])
    group.clock += 3
    group.changes.begin()
    assert group.changes.first_step(0) == 4
    train(group, [2])
    assert group.changes.survey(0, group.changes.touched(0, 5, 0)).selected == 1


def _step(tables: int, strategy: DynamicEmbEvictStrategy, begun: bool) -> Step:
    with meta_memory():
        group = TableGroup([config(f"t{table}", evict_strategy=strategy) for table in range(tables)], 1, META)
    if begun:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group.changes, "_clock", torch.zeros(tables, dtype=torch.int64))
            group.changes.begin()
            group.changes._noting()
    assert (group.changes._evictions is not None) == begun
    with recorded() as seen:
        keys = torch.empty(1000, dtype=torch.int64, device=META)
        rows, lookup = group.train_lookup(keys, torch.empty(1000, dtype=torch.int32, device=META))
        train_other = group.train_lookup(keys, torch.empty(1000, dtype=torch.int32, device=META))
        group.apply_gradients(lookup, rows), train_other
    assert (group.changes._evictions is not None) == begun
    return seen


@pytest.mark.parametrize("strategy", DynamicEmbEvictStrategy)
def test_steps_do_not_wait_and_cost_the_same_for_any_number_of_tables(strategy: DynamicEmbEvictStrategy) -> None:
    one, many = _step(1, strategy, begun=True), _step(26, strategy, begun=True)
    assert one.waits == [] and one.kernels == many.kernels
    assert len(one.kernels) > len(_step(1, strategy, begun=False).kernels)


def test_memory_is_bounded_and_as_documented() -> None:
    group = group_of(config(capacity=1 << 20, evict_strategy=LFU))
    group.changes.begin()
    train(group, [1])
    tensors = [
        value
        for part in (group.changes._evictions, group.changes._touches)
        for value in vars(part).values()
        if isinstance(value, torch.Tensor)
    ]
    expected = 16 * (1 << 18) + 4 * (1 << 20)
    assert expected <= sum(tensor.nbytes for tensor in tensors) < expected + 1024


def test_nothing_is_kept_before_the_beginning() -> None:
    group = group_of(config(evict_strategy=LFU))
    train(group, range(20))
    assert group.changes._evictions is None and group.changes._touches is None
    group.changes.begin()
    assert group.changes._evictions is None, "a model that is not trained needs no memory"
    train(group, [1])
    assert group.changes._evictions is not None and group.changes._touches is not None
