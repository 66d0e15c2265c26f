"""``requires_grad`` of a table's parameter decides whether the table takes updates, for each table on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.shard.alone import alone
from tests.shard.models import (
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    groups,
    local_table,
    rows,
    table,
    train_step,
)

BATCH = {"a": [[1, 2]], "b": [[2, 3]]}
ADAM = {"optimizer": EmbOptimType.ADAM, "learning_rate": 0.1}


def steps(model: nn.Module) -> dict[str, int]:
    return {
        config.name: int(group.steps[index]) for group in groups(model) for index, config in enumerate(group.configs)
    }


def freeze(model: nn.Module, name: str, frozen: bool = True) -> None:
    """Through the parameter that ``named_parameters()`` gives."""
    [parameter] = [value for key, value in model.named_parameters() if f".{name}." in key]
    parameter.requires_grad_(not frozen)


def table_state(model: nn.Module, name: str) -> list[torch.Tensor]:
    """Rows and optimizer state."""
    group, index = local_table(model, name)
    stored = group.stored_rows(index)
    return [stored.keys, stored.embeddings, *stored.states.values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other))


@pytest.mark.parametrize("fused_params", [None, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_one_of_two_tables_of_a_group(frozen: str, fused_params: dict[str, Any] | None) -> None:
    model, free = alone("a", "b", fused_params=fused_params), {"a": "b", "b": "a"}[frozen]
    reference = alone("a", "b", fused_params=fused_params)
    train_step(model, features_of(BATCH))
    freeze(model, frozen)
    before = table_state(model, frozen)
    for _ in range(3):
        output = rows(model, features_of(BATCH))
        assert all(values.requires_grad for values in output.values())
        sum(values.sum() for values in output.values()).backward()
    assert steps(model) == {frozen: 1, free: 4} and same(table_state(model, frozen), before)
    for _ in range(4):
        train_step(reference, features_of(BATCH))
    assert same(table_state(model, free), table_state(reference, free))
    freeze(model, frozen, False)
    for _ in range(3):
        train_step(model, features_of(BATCH))
    assert steps(model) == {frozen: 4, free: 7}, "a frozen table goes on where it stopped"
    assert same(table_state(model, frozen), table_state(reference, frozen))


def test_all_tables_of_a_group() -> None:
    """Nothing requires a gradient, so there is nothing to go back through. Ids are still inserted and scored."""
    model = alone("a", "b", evict_strategy=DynamicEmbEvictStrategy.LFU)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for mode in (True, False):
        model.train(mode)
        assert not any(values.requires_grad for values in rows(model, features_of(BATCH)).values())
    assert steps(model) == {"a": 0, "b": 0}
    assert table_statistics(model)["a"].size == 2 and int(local_table(model, "a")[0].clock[0]) == 1
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad = True
    train_step(model, features_of(BATCH))
    assert steps(model) == {"a": 1, "b": 1}
    assert torch.equal(local_table(model, "b")[0].stored_rows(1).embeddings, -torch.ones(2, 8))


def test_between_forward_and_backward_pass() -> None:
    """As for any leaf: a gradient needs ``requires_grad`` at both ends."""
    model = alone("a", "b")
    output = rows(model, features_of(BATCH))
    freeze(model, "a")
    sum(values.sum() for values in output.values()).backward()
    assert steps(model) == {"a": 0, "b": 1}
    output = rows(model, features_of(BATCH))
    freeze(model, "a", False)
    sum(values.sum() for values in output.values()).backward()
    assert steps(model) == {"a": 0, "b": 2}
    output = rows(model, features_of(BATCH))
    freeze(model, "a")
    freeze(model, "b")
    sum(values.sum() for values in output.values()).backward()
    assert steps(model) == {"a": 0, "b": 2}
    train_state = table_state(model, "a")
    assert not train_state[1].any()


def test_lookups_that_overlap() -> None:
    """Each goes by what was frozen when it was made, and its slots are looked up again."""
    model = alone("a", "b")
    first = rows(model, features_of(BATCH))
    freeze(model, "a")
    second = rows(model, features_of(BATCH))
    freeze(model, "a", False)
    sum(values.sum() for values in first.values()).backward()
    sum(values.sum() for values in second.values()).backward()
    assert steps(model) == {"a": 1, "b": 2}
    assert torch.equal(table_state(model, "a")[1], -torch.ones(2, 8))


def test_frozen_before_it_is_sharded() -> None:
    model = alone("a", "b", frozen=["b"])
    train_step(model, features_of(BATCH))
    assert steps(model) == {"a": 1, "b": 0}
    freeze(model, "b", False)
    train_step(model, features_of(BATCH))
    assert steps(model) == {"a": 2, "b": 1}


def several_groups(rank: int, world_size: int) -> dict[str, Any]:
    """A group for each strategy, and a static table beside them; the parameters are those of the wrapped model."""
    constraints = {
        "a": dynamic(initializer_args=ZEROS, max_capacity=512),
        "b": dynamic(initializer_args=ZEROS, max_capacity=512, evict_strategy=DynamicEmbEvictStrategy.LFU),
        "c": STATIC,
    }
    model = distribute(collection(*map(table, constraints)), constraints, (torch.optim.SGD, {"lr": 1.0}))
    batch = features_of({name: [[1, 2, 3 + rank]] for name in constraints})
    ids = {name: torch.arange(5) for name in constraints}
    result: dict[str, Any] = {}

    def step(what: str) -> None:
        before = evaluated(model, ids)
        output = rows(model, batch)
        result[f"{what} graph"] = {name: values.requires_grad for name, values in output.items()}
        loss = torch.stack([values.sum() for values in output.values()]).sum()
        loss.backward()
        after = evaluated(model, ids)
        result[what] = {name: bool((after[name] != before[name]).any()) for name in ids}

    step("none")
    freeze(model, "a")
    step("a")
    freeze(model, "b")
    step("both")
    freeze(model, "a", rank == 1)
    step("rank 1")  # this rank's rows of a are updated where they are not frozen
    freeze(model, "b", rank == 0)
    freeze(model, "a", rank == 0)
    step("rank 0")
    freeze(model, "a", False)
    freeze(model, "b", False)
    step("none again")
    result["steps"] = steps(model)
    return result


@pytest.mark.parametrize("world_size", [1, 2])
def test_groups_and_ranks(world_size: int) -> None:
    results = run_on_ranks(world_size, several_groups)
    for rank, result in enumerate(results):
        assert result["none"] == result["none again"] == {"a": True, "b": True, "c": True}
        assert result["a"] == {"a": False, "b": True, "c": True}
        assert result["both"] == {"a": False, "b": False, "c": True}
        assert result["both graph"] == {"a": False, "b": False, "c": True}
        assert result["none graph"] == result["a graph"] == {"a": True, "b": True, "c": True}
        assert result["steps"] == ({"a": 3, "b": 3}, {"a": 3, "b": 4})[rank] if world_size == 2 else True


def whole_ranks(rank: int, world_size: int) -> tuple[Callable[..., Any], ...] | list[Any]:
    """Only dynamic tables, and everything frozen on one rank, then on both, with overlapping batches in between."""
    model = distribute(
        collection(table("a")), {"a": dynamic(initializer_args=ZEROS, max_capacity=512)}, (torch.optim.SGD, {"lr": 1.0})
    )
    result = []
    for frozen_ranks in ([0], [1], [0, 1], []):
        freeze(model, "a", rank in frozen_ranks)
        output = rows(model, features_of({"a": [list(range(rank, 8))]}))["a"]
        result.append(output.requires_grad)
        if output.requires_grad:
            output.sum().backward()
        result.append(steps(model)["a"])
    return result


def test_ranks_that_differ() -> None:
    assert run_on_ranks(2, whole_ranks) == [
        [True, 0, True, 1, False, 1, True, 2],
        [True, 1, True, 1, False, 1, True, 2],
    ]
