"""Shapes in which a batch may come."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from tests.distributed import run_on_ranks
from tests.shard.models import STATIC, collection, distribute, dynamic, table

DEBUG = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.DEBUG)


def build(with_static: bool) -> nn.Module:
    """A row of a dynamic table is its id in every column, until it is trained."""
    options = dynamic(initializer_args=DEBUG, max_capacity=512)
    constraints = {"user": options, "item": options, "country": STATIC if with_static else options}
    return distribute(collection(*map(table, constraints)), constraints, (torch.optim.SGD, {"lr": 0.5}))


def check(model: nn.Module, features: KeyedJaggedTensor | TensorDict, ids: dict[str, list[list[int]]]) -> None:
    output = model(features)
    for name, samples in ids.items():
        assert output[name].lengths().tolist() == [len(sample) for sample in samples], name
        if name != "country":
            assert output[name].values()[:, 0].tolist() == [key for sample in samples for key in sample], name


def variable_stride(rank: int, world_size: int, with_static: bool) -> None:
    """Each feature has samples of its own number, expanded to the same batch (torchrec's variable batch per feature)."""
    features = KeyedJaggedTensor(
        keys=["item", "user", "country"],
        values=torch.tensor([10, 11, 12, 20, 21, 22, 23, 24, 25, 5]),
        lengths=torch.tensor([1, 2, 1, 2, 0, 3, 1]),
        stride_per_key_per_rank=[[2], [4], [1]],
        inverse_indices=(["item", "user", "country"], torch.tensor([[0, 0, 1, 1], [3, 1, 2, 0], [0, 0, 0, 0]])),
    )
    items, users = [[10], [11, 12]], [[20], [21, 22], [], [23, 24, 25]]
    expected = {
        "item": [items[0], items[0], items[1], items[1]],
        "user": [users[3], users[1], users[2], users[0]],
        "country": [[5], [5], [5], [5]],
    }
    check(build(with_static), features, expected)


@pytest.mark.parametrize("with_static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_variable_batch_per_feature(world_size: int, with_static: bool) -> None:
    run_on_ranks(world_size, variable_stride, with_static)


def tensor_dict(rank: int, world_size: int, with_static: bool) -> None:
    ids = {"country": [[1], [2, 3], []], "item": [[10 + rank], [], [11, 12]], "user": [[], [20, 21], [22]]}
    jagged = {
        name: torch.nested.nested_tensor_from_jagged(
            torch.tensor([key for sample in samples for key in sample]),
            lengths=torch.tensor([len(sample) for sample in samples]),
            offsets=torch.tensor([0, *torch.tensor([len(sample) for sample in samples]).cumsum(0).tolist()]),
        )
        for name, samples in ids.items()
    }
    check(build(with_static), TensorDict(jagged, batch_size=[3]), ids)


@pytest.mark.parametrize("with_static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_tensor_dict(world_size: int, with_static: bool) -> None:
    run_on_ranks(world_size, tensor_dict, with_static)
