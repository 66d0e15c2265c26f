"""``torch.compile`` of models with dynamic tables: the dense parts are compiled, and the tables are as without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.train_pipelines import TorchCompileConfig, TrainPipelinePT2
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from dynamicemb import DynamicEmbDump, DynamicEmbLoad
from dynamicemb.shard import ShardedDynamicEmbeddingCollection, table_statistics
from dynamicemb.shard.tables import dynamic_tables
from tests.distributed import run_on_ranks
from tests.shard.models import CPU, NORMAL, STATIC, collection, distribute, dynamic, evaluated, features_of, table

STEPS = 4
IDS = torch.arange(60)


class Tower(nn.Module):
    """The collection is a part of a part, as in most models."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = collection(table("item"), table("country", 60))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        rows = self.embeddings(features)
        return torch.cat([rows["item"].values(), rows["country"].values()])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sparse = Tower()
        self.over = nn.Linear(8, 4)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.tanh(self.over(self.sparse(batch.features)))
        return scores.sum(), scores.detach()


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(self.features.to(device))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)

    def pin_memory(self) -> Batch:
        return self


def batches(rank: int) -> Iterator[Batch]:
    """Sizes differ from step to step; none of the ids of one rank at last."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(60, (2, 7 + step), generator=generator).tolist()
        samples = {"item": [ids[0][:3], ids[0][3:]], "country": [ids[1], []]}
        yield Batch(features_of({name: [[], []] if step == 3 and rank else found for name, found in samples.items()}))


def build(model: nn.Module | None = None) -> nn.Module:
    model = Model() if model is None else model
    constraints = {"item": dynamic(initializer_args=NORMAL, max_capacity=256), "country": STATIC}
    return distribute(model, constraints, (torch.optim.Adagrad, {"lr": 0.1}))


def train(model: nn.Module, called: Callable[[Batch], Any], rank: int) -> list[float]:
    losses = []
    for batch in batches(rank):
        loss, _ = called(batch)
        loss.backward()
        losses.append(loss.item())
    return losses


def rows_of(model: nn.Module) -> torch.Tensor:
    (found,) = [part for part in model.modules() if isinstance(part, ShardedDynamicEmbeddingCollection)]
    rows = evaluated(found, {"item": IDS, "country": IDS})
    return torch.cat([rows["item"], rows["country"]])  # those of the dynamic table first


def same(model: nn.Module, expected: nn.Module) -> None:
    assert torch.equal(rows_of(model), rows_of(expected))
    assert table_statistics(model) == table_statistics(expected)
    assert [found.path for found in dynamic_tables(model)] == ["model.sparse.embeddings/item"]


def whole(model: nn.Module, backend: str) -> Callable[[Batch], Any]:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> Callable[[Batch], Any]:
    model.compile(backend=backend)
    return model


def collection_in_place(model: nn.Module, backend: str) -> Callable[[Batch], Any]:
    (found,) = [part for part in model.modules() if isinstance(part, ShardedDynamicEmbeddingCollection)]
    found.compile(backend=backend)
    return model


def inner_modules(model: nn.Module, backend: str) -> Callable[[Batch], Any]:
    """The wrappers of torch.compile in the middle of the path of the collection, twice."""
    inner = next(part for part in model.modules() if isinstance(part, Model))
    inner.sparse.embeddings = torch.compile(inner.sparse.embeddings, backend=backend)
    inner.sparse = torch.compile(inner.sparse, backend=backend)
    return model


def steps_with_backward(model: nn.Module, backend: str) -> Callable[[Batch], Any]:
    def step(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, scores = model(batch)
        loss.backward()
        # What is left to do for the caller does nothing.
        return (loss.detach() + torch.zeros((), requires_grad=True)), scores

    return torch.compile(step, backend=backend)


HOWS = (whole, in_place, collection_in_place, inner_modules, steps_with_backward)


def compiled(rank: int, world_size: int, folder: str) -> None:
    """Losses may differ in the last bits where a backend computes; with `eager` nothing may differ."""
    expected = build()
    losses = train(expected, expected, rank)
    for how in HOWS:
        torch._dynamo.reset()
        model = build()
        called = how(model, "eager")
        assert train(model, called, rank) == losses, how.__name__
        same(model, expected)
        for batch in batches(rank):
            called.eval() if isinstance(called, nn.Module) else model.eval()
            expected.eval()
            with torch.no_grad():
                if how is not steps_with_backward:
                    assert torch.equal(called(batch)[1], expected(batch)[1])
        expected.train()
    torch._dynamo.reset()
    before = build(torch.compile(Model(), backend="eager"))
    assert train(before, before, rank) == losses, "compiled before it is distributed"
    same(before, expected)
    files_and_state_dicts(expected, folder)


def files_and_state_dicts(expected: nn.Module, folder: str) -> None:
    """A compiled model is dumped, and loaded, under the names that it has without compilation."""
    model = build()
    wrapped = torch.compile(model, backend="eager")
    DynamicEmbDump(folder, expected, optim=True)
    DynamicEmbLoad(folder, wrapped, optim=True)
    assert torch.equal(rows_of(model)[:60], rows_of(expected)[:60])
    DynamicEmbDump(folder, wrapped, optim=True, overwrite=True)
    other = build()
    DynamicEmbLoad(folder, other, optim=True)
    assert torch.equal(rows_of(other)[:60], rows_of(expected)[:60])
    third = build()
    # The wrapper of torch.compile shows its own name; DistributedModelParallel takes names without any.
    third.load_state_dict({name.removeprefix("_orig_mod."): entry for name, entry in wrapped.state_dict().items()})
    assert torch.equal(rows_of(third), rows_of(wrapped))


@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_models_train_and_evaluate_the_same(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, compiled, str(tmp_path / "checkpoint"))


def full_graph(rank: int, world_size: int) -> None:
    model = torch.compile(build(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(next(batches(rank)))


def test_a_full_graph_is_refused_by_torch() -> None:
    run_on_ranks(1, full_graph)


def dense_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([value for name, value in model.named_parameters() if "over" in name], lr=0.1)


def pipelines(rank: int, world_size: int, backend: str) -> None:
    models = [build() for _ in range(3)]
    plain, pt2, sparse_dist = models
    optimizer = dense_optimizer(plain)
    outputs = []
    for batch in batches(rank):
        optimizer.zero_grad()
        loss, scores = plain(batch)
        loss.backward()
        optimizer.step()
        outputs.append(scores)
    configs = TorchCompileConfig(backend=backend, compile_on_iter=1)
    made = [
        TrainPipelinePT2(pt2, dense_optimizer(pt2), CPU, configs, input_transformer=lambda batch: batch),
        TrainPipelineSparseDist(sparse_dist, dense_optimizer(sparse_dist), CPU),
    ]
    for pipeline, model in zip(made, models[1:], strict=True):
        source = batches(rank)
        for expected in outputs:
            assert torch.allclose(pipeline.progress(source), expected, atol=1e-6)
        if isinstance(pipeline, TrainPipelineSparseDist):
            pipeline.detach()
        assert torch.allclose(rows_of(model), rows_of(plain), atol=1e-6)
        assert table_statistics(model) == table_statistics(plain)


@pytest.mark.parametrize("world_size", [1, 2])
def test_pipelines_of_torchrec(world_size: int) -> None:
    run_on_ranks(world_size, pipelines, "eager")


def inductor(rank: int, world_size: int) -> None:
    model, expected = build(), build()
    losses = train(model, torch.compile(model), rank)
    assert losses == pytest.approx(train(expected, expected, rank), rel=1e-6)
    assert torch.allclose(rows_of(model), rows_of(expected), atol=1e-6)


@pytest.mark.slow
def test_inductor() -> None:
    run_on_ranks(1, inductor)
