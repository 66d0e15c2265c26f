"""Shapes in which a batch may come."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from tensordict import TensorDict
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    features_of,
    local_table,
    rows,
    table,
    train_step,
)

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
    """Each feature has its own number of samples, expanded to the same batch (torchrec's VBE)."""
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


def one_feature_for_several_tables(rank: int, world_size: int) -> None:
    """Dynamic tables of different groups and a static one; the first has more ids than any memory has rows."""
    tables = [
        table("large", 2**40, 4, ["user", "only_large"]),
        table("frequent", 100, 4, ["user"]),
        table("static", 100, 4, ["only_static", "user"]),
    ]
    constraints = {
        "large": dynamic(initializer_args=DEBUG, max_capacity=512),
        "frequent": dynamic(initializer_args=ZEROS, evict_strategy=DynamicEmbEvictStrategy.LFU),
        "static": STATIC,
    }
    model = distribute(collection(*tables), constraints, (torch.optim.SGD, {"lr": 1.0}))
    batch = features_of({"only_static": [[1]], "user": [[5, 6]], "only_large": [[9]]})
    output = train_step(model, batch)
    assert sorted(output) == ["only_large", "only_static", "user@frequent", "user@large", "user@static"]
    assert output["user@large"][:, 0].tolist() == [5.0, 6.0] and output["only_large"][:, 0].tolist() == [9.0]
    assert not output["user@frequent"].any()
    again = train_step(model, batch)
    assert again["user@large"][:, 0].tolist() == [4.0, 5.0] and again["user@frequent"][:, 0].tolist() == [-1.0, -1.0]
    assert torch.equal(again["user@static"], output["user@static"] - 1.0)
    assert table_statistics(model)["large"].size == 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_feature_for_several_tables(world_size: int) -> None:
    run_on_ranks(world_size, one_feature_for_several_tables)


def need_indices(rank: int, world_size: int) -> None:
    tables = [table("item"), table("country", 100)]
    module = EmbeddingCollection(tables=tables, device=torch.device("meta"), need_indices=True)
    constraints = {"item": dynamic(initializer_args=DEBUG), "country": STATIC}
    model = distribute(module, constraints, (torch.optim.SGD, {"lr": 1.0}))
    output = model(features_of({"country": [[1]], "item": [[5, -6]]}))
    assert output["item"].weights().tolist() == [5, -6] and output["country"].weights().tolist() == [1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_need_indices(world_size: int) -> None:
    run_on_ranks(world_size, need_indices)


def half_outputs(rank: int, world_size: int) -> None:
    fused_params = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1.0, "output_dtype": SparseType.FP16}
    sharder = DynamicEmbeddingCollectionSharder(fused_params=fused_params)
    constraints = {"item": dynamic(initializer_args=DEBUG), "user": dynamic(initializer_args=ZEROS)}
    model = distribute(collection(table("item"), table("user")), constraints, sharder=sharder)
    batch = features_of({"item": [[2049, 3, 3]], "user": [[1]]})
    output = train_step(model, batch)
    assert all(values.dtype is torch.float16 for values in output.values())
    assert output["item"][:, 0].tolist() == [2048.0, 3.0, 3.0], "2049 is no float16"
    assert train_step(model, batch)["item"][:, 0].tolist() == [2048.0, 1.0, 1.0]
    group, index = local_table(model, "item")
    stored = group.stored_rows(index)
    found = dict(zip(stored.keys.tolist(), stored.embeddings[:, 0].tolist()))
    assert found.items() <= {2049: 2047.0, 3: -1.0}.items(), "the rows themselves are float32"


@pytest.mark.parametrize("world_size", [1, 2])
def test_output_dtype(world_size: int) -> None:
    run_on_ranks(world_size, half_outputs)


def inference_mode(rank: int, world_size: int) -> None:
    options = dynamic(initializer_args=ZEROS)
    model = distribute(collection(table("item")), {"item": options}, (torch.optim.SGD, {"lr": 1.0}))
    batch = features_of({"item": [[5, 6, 5]]})
    train_step(model, batch)
    model.eval()
    with torch.inference_mode():
        assert rows(model, batch)["item"][:, 0].tolist() == [-2.0, -1.0, -2.0]
    model.train()
    train_step(model, batch)
    assert rows(model, batch)["item"][:, 0].tolist() == [-4.0, -2.0, -4.0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_inference_mode_between_steps(world_size: int) -> None:
    run_on_ranks(world_size, inference_mode)
