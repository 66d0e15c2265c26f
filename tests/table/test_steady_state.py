"""Lookups and updates of a group of tables as a GPU gets them: no wait, and as many kernels for one table as for 26."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.function import lookup
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig
from tests.steady_state import META, Step, meta_memory, recorded
from tests.table.groups import NORMAL, config

KEYS = 1000
#: The kernels of a training lookup, one of them torch's own, and those of its update.
DEDUP = [
    "triton._prefix_kernel", "aten.sort.stable", "triton._compare_kernel", "triton._settle_kernel",
    "triton._number_kernel",
]  # fmt: skip
LOOKUP = [
    "triton._find_kernel", "triton._insert_kernel", "triton._fill_kernel", "triton._tally_kernel",
    "triton._gather_kernel",
]  # fmt: skip
UPDATE = ["triton._begin_update_kernel", "triton._update_kernel"]


def group_of(tables: int = 1, **fields: Any) -> TableGroup:
    """At capacity from the start, unless ``fields`` say otherwise."""
    with meta_memory():
        return TableGroup([config(f"t{table}", **fields) for table in range(tables)], 1, META)


def rows_of(group: TableGroup, counts: Optional[torch.Tensor] = None, training: bool = True) -> torch.Tensor:
    keys = torch.empty(KEYS, dtype=torch.int64, device=META)
    tables = torch.empty(KEYS, dtype=torch.int32, device=META)
    anchor = torch.empty(0, device=META, requires_grad=True)
    return lookup(group, anchor, keys, tables, counts, training)


def train(group: TableGroup) -> None:
    rows = rows_of(group)
    rows.backward(torch.empty_like(rows))


def train_with_counts(group: TableGroup) -> None:
    """As on several ranks."""
    rows = rows_of(group, torch.empty(KEYS, dtype=torch.int64, device=META))
    rows.backward(torch.empty_like(rows))


def train_overlapping(group: TableGroup) -> None:
    """The slots of the first lookup may be others' by the time of its update."""
    first, second = rows_of(group), rows_of(group)
    second.backward(torch.empty_like(second))
    first.backward(torch.empty_like(first))


def evaluate(group: TableGroup) -> None:
    rows_of(group, training=False)


PHASES = [train, train_with_counts, train_overlapping, evaluate]


def step(phase: Callable[[TableGroup], None], group: TableGroup) -> Step:
    with recorded() as seen:
        phase(group)
    return seen


@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("strategy", DynamicEmbEvictStrategy)
@pytest.mark.parametrize("phase", PHASES)
def test_nothing_waits(
    phase: Callable[[TableGroup], None], strategy: DynamicEmbEvictStrategy, kind: OptimizerKind
) -> None:
    group = group_of(2, evict_strategy=strategy, optimizer=OptimizerConfig(kind), eval_initializer=NORMAL)
    assert step(phase, group).waits == []


def begin_to_note(group: TableGroup) -> None:
    """Notes changes from now on, as after a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.changes, "_clock", torch.zeros(len(group.configs), dtype=torch.int64))
        group.changes.begin()
    assert group.changes.log() is not None  # takes the memory


@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("strategy", DynamicEmbEvictStrategy)
def test_the_kernels_of_a_step(strategy: DynamicEmbEvictStrategy, kind: OptimizerKind) -> None:
    """No clock, no score, no count of steps and no bias correction has a kernel of its own."""
    group = group_of(2, evict_strategy=strategy, optimizer=OptimizerConfig(kind))
    assert step(train, group).kernels == DEDUP + LOOKUP + UPDATE
    assert step(evaluate, group).kernels == ["triton._find_kernel", "triton._gather_kernel"]


@pytest.mark.parametrize("strategy", DynamicEmbEvictStrategy)
def test_noting_changes_is_one_kernel(strategy: DynamicEmbEvictStrategy) -> None:
    """And one more for an update that comes late, where scores do not tell what has been touched."""
    usual, noted = group_of(2, evict_strategy=strategy), group_of(2, evict_strategy=strategy)
    begin_to_note(noted)
    tallied = LOOKUP.index("triton._tally_kernel") + 1
    assert step(train, noted).kernels == [
        *DEDUP, *LOOKUP[:tallied], "triton._note_kernel", *LOOKUP[tallied:], *UPDATE
    ]  # fmt: skip
    late = [] if strategy is DynamicEmbEvictStrategy.LRU else ["triton._note_touches_kernel"]
    more = ["triton._note_kernel", "triton._note_kernel", *late]
    expected = step(train_overlapping, usual).kernels + more
    assert sorted(step(train_overlapping, noted).kernels) == sorted(expected)
    assert step(evaluate, noted).kernels == step(evaluate, usual).kernels


def test_noting_an_empty_batch_moves_the_time_alone() -> None:
    group = group_of(2)
    begin_to_note(group)
    nothing = torch.empty(0, dtype=torch.int64, device=META)
    with recorded() as seen:
        group.train_lookup(nothing, nothing.int())
    assert [kernel for kernel in seen.kernels if "triton" in kernel] == ["triton._tally_kernel"]


@pytest.mark.parametrize("strategy", DynamicEmbEvictStrategy)
@pytest.mark.parametrize("phase", PHASES)
def test_as_many_kernels_for_any_number_of_tables(
    phase: Callable[[TableGroup], None], strategy: DynamicEmbEvictStrategy
) -> None:
    fields = {"evict_strategy": strategy, "optimizer": OptimizerConfig(OptimizerKind.ADAM), "eval_initializer": NORMAL}
    one, eight, many = (step(phase, group_of(tables, **fields)).kernels for tables in (1, 8, 26))
    assert one == eight == many
    assert any(kernel.startswith("triton.") for kernel in one)


@pytest.mark.parametrize("tables", [1, 3])
def test_an_evaluation_initializer_costs_one_kernel(tables: int) -> None:
    """Which looks for missing keys among the slots; rows of keys that are there are not touched again."""
    zeros = step(evaluate, group_of(tables)).kernels
    values = step(evaluate, group_of(tables, eval_initializer=NORMAL)).kernels
    assert values == [*zeros, "triton._fill_missing_kernel"]


def test_a_table_that_has_room_to_grow_and_need_not_does_not_wait() -> None:
    group = group_of(capacity=64 * KEYS, init_capacity=8 * KEYS, max_load_factor=0.5)
    assert group.storage.geometries[0].can_grow
    for _ in range(4):
        assert step(train, group).waits == []


def test_a_table_that_may_grow_is_asked_because_of_its_own_ids_alone() -> None:
    """Ten of a thousand: four such batches are far from half of it. Without their numbers they might all be its own."""
    tables = [config("grows", capacity=64 * KEYS, init_capacity=8 * KEYS), config("full", capacity=64 * KEYS)]
    with meta_memory():
        group = TableGroup(tables, 1, META)
    keys, indices = torch.empty(KEYS, dtype=torch.int64, device=META), torch.empty(KEYS, dtype=torch.int32, device=META)
    for _ in range(40):
        with recorded() as seen:
            group.train_lookup(keys, indices, lengths_by_table=[[4, KEYS - 504], [6, 494]])
        assert seen.waits == []
    with recorded(), pytest.raises(NotImplementedError, match="meta"):
        [group.train_lookup(keys, indices) for _ in range(4)]


def test_a_table_that_may_have_to_grow_asks() -> None:
    """Its size decides, and that is on the device: four batches may have filled half of it."""
    group = group_of(capacity=64 * KEYS, init_capacity=8 * KEYS, max_load_factor=0.5)
    for _ in range(4):
        step(train, group)
    with recorded(), pytest.raises(NotImplementedError, match="meta"):
        train(group)


def test_freezing_a_table_does_not_wait_and_costs_nothing_where_none_is_frozen() -> None:
    group = group_of(8)
    weights = [torch.empty(0, device=META, requires_grad=True) for _ in group.configs]

    def train_with_weights(group: TableGroup) -> None:
        keys = torch.empty(KEYS, dtype=torch.int64, device=META)
        tables = torch.empty(KEYS, dtype=torch.int32, device=META)
        rows = lookup(group, weights[0], keys, tables, None, True, weights)
        rows.backward(torch.empty_like(rows))

    usual = step(train, group).kernels
    assert step(train_with_weights, group).kernels == usual
    for frozen in ({3}, {3, 5}, {5}, {1, 2, 3, 4, 5, 6, 7}):
        for table, weight in enumerate(weights):
            weight.requires_grad_(table not in frozen)
        changing, steady = step(train_with_weights, group), step(train_with_weights, group)
        assert changing.waits == steady.waits == []
        assert len(steady.kernels) <= len(usual) + 3
    for weight in weights:
        weight.requires_grad_(True)
    assert step(train_with_weights, group).kernels == usual
