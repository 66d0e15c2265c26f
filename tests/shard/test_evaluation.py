"""Evaluation reads and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.shard import get_score, table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    NORMAL,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    groups,
    one_sample,
    rows,
    table,
    train_step,
)

KNOWN, UNKNOWN = torch.arange(30), torch.arange(1000, 1030)
CONSTANT = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=0.5)


def build() -> nn.Module:
    """Missing ids read as zeros, as a constant, and as what training would insert; the two last ones share a group."""
    shared: dict[str, Any] = {"max_capacity": 256, "init_capacity": 128, "initializer_args": NORMAL}
    constraints = {
        "zeros": dynamic(evict_strategy=DynamicEmbEvictStrategy.LFU, **shared),
        "constant": dynamic(eval_initializer_args=CONSTANT, **shared),
        "promise": dynamic(eval_initializer_args=NORMAL, **shared),
    }
    return distribute(collection(*map(table, constraints)), constraints, (RowWiseAdagrad, {"lr": 0.5, "eps": 1e-8}))


def state(model: nn.Module) -> list[torch.Tensor]:
    """Every byte that this rank's tables have, growth and counters included."""
    tensors: list[torch.Tensor] = []
    for group in groups(model):
        for index in range(len(group.configs)):
            stored = group.stored_rows(index)
            tensors += [stored.keys, stored.slots, stored.scores, stored.embeddings, stored.states["sum"]]
        tensors += [group.clock.clone(), group.steps.clone(), torch.tensor([vars(c)["hits"] for c in group.counters()])]
    return tensors


def evaluate(rank: int, world_size: int) -> None:
    model = build()
    names = ("zeros", "constant", "promise")
    trained = [train_step(model, one_sample(dict.fromkeys(names, KNOWN)))]
    before, statistics, score = state(model), table_statistics(model), get_score(model)
    model.eval()
    many = torch.arange(5000)
    for features in (dict.fromkeys(names, KNOWN), dict.fromkeys(names, UNKNOWN), dict.fromkeys(names, many)):
        output = rows(model, one_sample(features))
        # As torchrec's rows in evaluation, they are part of a graph; the end of that changes nothing.
        loss = torch.stack([number * values.sum() for number, values in enumerate(output.values())]).sum()
        gradients = torch.autograd.grad(loss, list(output.values()), retain_graph=True)
        assert [set(gradient.flatten().tolist()) for gradient in gradients] == [{0.0}, {1.0}, {2.0}]
        loss.backward()
    with torch.no_grad():
        output = rows(model, one_sample(dict.fromkeys(names, torch.cat([KNOWN, UNKNOWN, KNOWN]))))
        assert not any(values.requires_grad for values in output.values())
    after = state(model)
    assert len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after))
    assert table_statistics(model) == statistics and get_score(model) == score
    for values in output.values():
        known, _, again = values.split(30)
        assert torch.equal(known, again)
        assert not torch.equal(known, trained[0]["zeros"])
    assert not output["zeros"][30:60].any()
    assert torch.equal(output["constant"][30:60], torch.full((30, 8), 0.5))
    # What is read of the unknown ids is what training then inserts.
    model.train()
    inserted = train_step(model, one_sample(dict.fromkeys(names, UNKNOWN)))
    assert torch.equal(inserted["promise"], output["promise"][30:60])
    assert inserted["constant"].std() > 0.5


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_changes_nothing(world_size: int) -> None:
    run_on_ranks(world_size, evaluate)


def without_optimizer(rank: int, world_size: int) -> None:
    options = dynamic(initializer_args=NORMAL, eval_initializer_args=CONSTANT)
    model = distribute(collection(table("item")), {"item": options})
    model.eval()
    assert torch.equal(rows(model, features_of({"item": [[1, 2], []]}))["item"], torch.full((2, 8), 0.5))
    model.train()
    train_step(model, features_of({"item": [[1], [2]]}))
    assert torch.equal(evaluated(model, {"item": torch.tensor([3])})["item"], torch.full((1, 8), 0.5))


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_an_optimizer(world_size: int) -> None:
    run_on_ranks(world_size, without_optimizer)


def one_rank_evaluates_nothing(rank: int, world_size: int) -> None:
    """A rank may be in evaluation with an empty batch, and features may be empty."""
    model = build()
    names = ("zeros", "constant", "promise")
    train_step(model, one_sample(dict.fromkeys(names, KNOWN)))
    model.eval()
    empty = features_of({name: [] for name in names})
    output = rows(model, empty if rank == 1 else one_sample(dict.fromkeys(names, KNOWN)))
    assert all(values.shape == (0 if rank == 1 else 30, 8) for values in output.values())
    output = rows(model, one_sample({"zeros": KNOWN[:0], "constant": KNOWN, "promise": KNOWN[:0]}))
    assert [output[name].shape[0] for name in names] == [0, 30, 0]


def test_empty_batches_in_evaluation() -> None:
    run_on_ranks(2, one_rank_evaluates_nothing)
