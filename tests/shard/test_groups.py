"""Tables that could not differ more share a collection, and each behaves as it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.shard import set_score, table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    groups,
    local_table,
    one_sample,
    rows,
    table,
)

MODES = DynamicEmbInitializerMode


def args(mode: DynamicEmbInitializerMode, **fields: float) -> DynamicEmbInitializerArgs:
    return DynamicEmbInitializerArgs(mode=mode, **fields)


#: Options and optimizer of each table. The two first ones may share a group, as may the fifth and the sixth; the order
#: of the tables is not that of their groups.
TABLES: dict[str, tuple[dict[str, Any], tuple[type, dict[str, Any]]]] = {
    "a": ({"initializer_args": args(MODES.NORMAL)}, (torch.optim.SGD, {"lr": 0.5})),
    "narrow": (
        {"initializer_args": args(MODES.UNIFORM), "embedding_dtype": torch.float16}, (torch.optim.SGD, {"lr": 0.25})
    ),
    "b": ({"initializer_args": args(MODES.CONSTANT, value=2.0), "seed": 9}, (torch.optim.SGD, {"lr": 2.0})),
    "lfu": (
        {"evict_strategy": DynamicEmbEvictStrategy.LFU, "initializer_args": args(MODES.TRUNCATED_NORMAL)},
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}),
    ),
    "c": ({"initializer_args": args(MODES.DEBUG), "init_capacity": 16}, (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-4})),
    "brain": (
        {"initializer_args": args(MODES.NORMAL), "embedding_dtype": torch.bfloat16, "bucket_capacity": 8},
        (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-2}),
    ),
    "d": ({"initializer_args": args(MODES.NORMAL, mean=3.0)}, (RowWiseAdagrad, {"lr": 0.2, "eps": 1e-8})),
    "given": ({"evict_strategy": DynamicEmbEvictStrategy.CUSTOMIZED}, (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-8})),
}  # fmt: skip
STEPS = 12


def build(names: list[str]) -> nn.Module:
    module = collection(*(table(name, 500, features=[f"{name}_1", f"{name}_2"]) for name in names))
    for name in names:
        optimizer, arguments = TABLES[name][1]
        apply_optimizer_in_backward(optimizer, module.embeddings[name].parameters(), dict(arguments))
    shared = {"max_capacity": 96, "bucket_capacity": 16}
    return distribute(module, {name: dynamic(**{**shared, **TABLES[name][0]}) for name in names})


def train(model: nn.Module, names: list[str], rank: int) -> list[dict[str, torch.Tensor]]:
    """What the forward passes read; a table's ids and gradients do not depend on the other tables."""
    seen = []
    for step in range(STEPS):
        if "given" in names:
            set_score(model, 5 - step)
        ids, generators = {}, {}
        for name in names:
            generators[name] = torch.Generator().manual_seed(1000 * step + 10 * rank + list(TABLES).index(name))
            for feature in (f"{name}_1", f"{name}_2"):
                ids[feature] = (torch.rand(40, generator=generators[name]) ** 2 * 400).long()
        output = rows(model, one_sample(ids))
        losses = [
            (output[feature] * torch.rand(output[feature].shape, generator=generators[name])).sum()
            for name in names
            for feature in (f"{name}_1", f"{name}_2")
        ]
        torch.stack(losses).sum().backward()
        seen.append({feature: values.detach().clone() for feature, values in output.items()})
    return seen


def together_and_alone(rank: int, world_size: int) -> int:
    names = list(TABLES)
    model = build(names)
    seen = train(model, names, rank)
    statistics = table_statistics(model)
    for name in names:
        alone = build([name])
        for step, output in enumerate(train(alone, [name], rank)):
            for feature, values in output.items():
                assert torch.equal(values, seen[step][feature]), f"step {step}, feature {feature}"
        assert table_statistics(alone)[name] == statistics[name]
        assert statistics[name].evicted > 0, name
        own, other = (group.stored_rows(index) for group, index in (local_table(alone, name), local_table(model, name)))
        assert torch.equal(own.keys, other.keys) and torch.equal(own.scores, other.scores)
        assert torch.equal(own.embeddings, other.embeddings) and own.states.keys() == other.states.keys()
        assert all(torch.equal(own.states[state], other.states[state]) for state in own.states)
        assert (train(alone, [name], rank)[0][f"{name}_1"] != seen[0][f"{name}_1"]).any(), "it has learnt"
    return len(groups(model))


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_table_is_as_it_is_alone(world_size: int) -> None:
    assert run_on_ranks(world_size, together_and_alone) == [6] * world_size


def pass_twice(rank: int, world_size: int) -> None:
    """Two batches before the first backward pass, one of them used twice; the steps of a training loop in any order."""
    constraints = {"item": dynamic(initializer_args=ZEROS)}
    model = distribute(collection(table("item")), constraints, (torch.optim.SGD, {"lr": 1.0}))
    first = rows(model, features_of({"item": [[1, 2]]}))["item"]
    second = rows(model, features_of({"item": [[2], [3 + rank]]}))["item"]
    second.sum().backward(retain_graph=True)
    first.sum().backward()
    second.sum().backward()
    assert evaluated(model, {"item": torch.arange(1, 5)})["item"][:, 0].tolist() == [
        -1.0, -3.0, -2.0 / world_size, -2.0 / world_size if world_size > 1 else 0.0
    ]  # fmt: skip
    with torch.no_grad():
        without = rows(model, features_of({"item": [[1, 9]]}))["item"]
    assert not without.requires_grad and without[0, 0] == -1.0
    assert table_statistics(model)["item"].size == 3 + world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_forward_and_backward_passes_in_any_order(world_size: int) -> None:
    run_on_ranks(world_size, pass_twice)
