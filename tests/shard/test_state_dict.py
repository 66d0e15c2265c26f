"""What torchrec and torch see of a collection with dynamic tables: parameters and state."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbWarning
from tests.distributed import run_on_ranks
from tests.shard.models import (
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    table,
    train_step,
)

IDS = {"item": torch.arange(4), "country": torch.arange(4), "user": torch.arange(4)}
SGD = (torch.optim.SGD, {"lr": 1.0})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = collection(table("item", 40), table("country", 40), table("user", 40))
        self.dense = nn.Linear(8, 1)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Any]:
        return dict(self.embeddings(features).items())


def build(plain: bool = False, all_dynamic: bool = False) -> nn.Module:
    options = dynamic(initializer_args=ZEROS)
    constraints = {"item": options, "country": options if all_dynamic else STATIC, "user": options}
    return distribute(Model(), dict.fromkeys(constraints, STATIC) if plain else constraints, SGD, plain=plain)


def save_and_load(rank: int, world_size: int) -> None:
    model = build()
    train_step(model, features_of({name: [[1, 2, 3]] for name in IDS}))
    with pytest.warns(DynamicEmbWarning, match="item, user"):
        state = model.state_dict()
    assert sorted(state) == ["dense.bias", "dense.weight", "embeddings.embeddings.country.weight"]
    before = evaluated(model, IDS)
    other = build()
    trained = train_step(other, features_of({name: [[2, 7]] for name in IDS}))
    own = evaluated(other, IDS)
    assert trained["country"].any() and not torch.equal(own["country"], before["country"])
    outcome = other.load_state_dict(dict(state))  # a copy: torchrec renames the entries of what it is given
    assert outcome.missing_keys == [] and outcome.unexpected_keys == []
    after = evaluated(other, IDS)
    assert torch.equal(after["country"], before["country"])
    assert torch.equal(after["item"], own["item"]), "dynamic tables are left alone"
    assert torch.equal(other.state_dict()["dense.weight"], state["dense.weight"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_dict_holds_static_tables_alone(world_size: int) -> None:
    run_on_ranks(world_size, save_and_load)


def only_dynamic(rank: int, world_size: int) -> None:
    model = build(all_dynamic=True)
    with pytest.warns(DynamicEmbWarning):
        assert sorted(model.state_dict()) == ["dense.bias", "dense.weight"]
    assert sorted(model.state_dict(prefix="a.")) == ["a.dense.bias", "a.dense.weight"]


def test_no_tensor_stands_for_a_dynamic_table() -> None:
    run_on_ranks(1, only_dynamic)


def load_static_state(rank: int, world_size: int) -> None:
    """Rows of a static table belong to positions, not to ids: they are not loaded, and that is said."""
    plain = build(plain=True)
    train_step(plain, features_of({name: [[1, 2, 3]] for name in IDS}))
    state = plain.state_dict()
    model = build()
    train_step(model, features_of({name: [[2, 7]] for name in IDS}))
    own = evaluated(model, IDS)
    with pytest.warns(DynamicEmbWarning, match="item, user"):
        model.load_state_dict(state)
    after = evaluated(model, IDS)
    assert torch.equal(after["item"], own["item"])
    assert torch.equal(after["country"], evaluated(plain, IDS)["country"])


def test_load_state_dict_of_a_static_model() -> None:
    run_on_ranks(1, load_static_state)


def no_warning_without_dynamic_tables(rank: int, world_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DynamicEmbWarning)
        model = distribute(Model(), dict.fromkeys(IDS, STATIC), SGD)
        model.load_state_dict(model.state_dict())
        assert "embeddings.embeddings.item.weight" in model.state_dict()


def test_our_sharder_with_static_tables_alone_is_silent() -> None:
    run_on_ranks(1, no_warning_without_dynamic_tables)


def parameters(rank: int, world_size: int) -> None:
    model, plain = build(), build(plain=True)
    names, plain_names = (sorted(name for name, _ in entry.named_parameters()) for entry in (model, plain))
    assert names == plain_names
    dense = sorted(name for name, _ in in_backward_optimizer_filter(model.named_parameters()))
    assert dense == ["dense.bias", "dense.weight"]
    in_backward = dict(in_backward_optimizer_filter(model.named_parameters(), include=True))
    assert sorted(in_backward) == [f"embeddings.embeddings.{name}.weight" for name in ("country", "item", "user")]
    assert all(in_backward[f"embeddings.embeddings.{name}.weight"].numel() == 0 for name in ("item", "user"))
    assert sorted(model.fused_optimizer.params) == sorted(plain.fused_optimizer.params)
    # A user's optimizer over all parameters, and a norm over their gradients, meet nothing that they cannot bear.
    train_step(model, features_of({name: [[1]] for name in IDS}))
    assert all(in_backward[name].grad is None or in_backward[name].grad.numel() == 0 for name in in_backward)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert model.module.embeddings.fused_optimizer is not None


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_are_named_as_torchrec_names_them(world_size: int) -> None:
    run_on_ranks(world_size, parameters)
