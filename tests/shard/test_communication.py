"""How keys, rows and gradients travel: quantised, divided or not, pipelined, and over a group that is not everyone."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, table_statistics
from tests import tolerances
from tests.distributed import run_on_ranks
from tests.shard.models import (
    CPU,
    NORMAL,
    STATIC,
    ZEROS,
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

ALL = {"item": torch.arange(60), "user": torch.arange(60), "country": torch.arange(60)}
ADAGRAD = (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8})


def build(
    sharder: Optional[DynamicEmbeddingCollectionSharder] = None, group: Optional[dist.ProcessGroup] = None
) -> nn.Module:
    """With a static table, unless it is for a group: torchrec shards those over all ranks only."""
    options: dict[str, Any] = {"initializer_args": NORMAL, "max_capacity": 512}
    constraints = {
        "item": dynamic(**options),
        "user": dynamic(evict_strategy=DynamicEmbEvictStrategy.LFU, **options),
        "country": STATIC if group is None else dynamic(**options),
    }
    return distribute(collection(*(table(name, 60) for name in ALL)), constraints, ADAGRAD, sharder, group)


def make_batch(rank: int, step: int, samples: int = 8) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    lengths = torch.randint(0, 4, (3 * samples,), generator=generator)
    values = torch.randint(0, 60, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys=list(ALL), values=values, lengths=lengths)


def train(model: nn.Module, rank: int, steps: int = 8) -> list[dict[str, torch.Tensor]]:
    """Returns the rows read in each step."""
    seen = []
    for step in range(steps):
        output = rows(model, make_batch(rank, step))
        torch.stack([values.sin().sum() for values in output.values()]).sum().backward()
        seen.append({name: values.detach().clone() for name, values in output.items()})
    return seen


# ------------------------------------------------------------------------------------------- quantised


def quantised(rank: int, world_size: int) -> dict[str, float]:
    torch.manual_seed(0)
    exact = build()
    registry = get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16), device=CPU
    )
    model = build(DynamicEmbeddingCollectionSharder(qcomm_codecs_registry=registry))
    outputs, expected = train(model, rank), train(exact, rank)
    assert all(output["item"].dtype is torch.float32 for output in outputs)
    assert torch.equal(outputs[0]["item"], expected[0]["item"].half().float()), "one rounding on the way"
    after, exactly = evaluated(model, ALL), evaluated(exact, ALL)
    return {name: float((after[name] - exactly[name]).abs().max()) for name in ("item", "user")}


def test_quantised_communication() -> None:
    for errors in run_on_ranks(2, quantised):
        for error in errors.values():
            assert 0.0 < error < tolerances.QUANTISED_ROW_ATOL


def quantised_gradients(rank: int, world_size: int) -> list[float]:
    """1 + 2**-12 is no float16 (in which torchrec sends gradients when bfloat16 is asked for and gloo used)."""
    registry = get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16), device=CPU
    )
    constraints = {"item": dynamic(initializer_args=ZEROS)}
    sharder = DynamicEmbeddingCollectionSharder(qcomm_codecs_registry=registry)
    model = distribute(collection(table("item")), constraints, (torch.optim.SGD, {"lr": 1.0}), sharder)
    (rows(model, features_of({"item": [[5]]}))["item"] * (1 + 2.0**-12)).sum().backward()
    # Not by evaluation, whose rows travel quantised as well.
    return groups(model)[0].stored_rows(0).embeddings.unique().tolist()


def test_gradients_are_quantised() -> None:
    assert sorted(run_on_ranks(2, quantised_gradients)) == [[], [-1.0]]


# ------------------------------------------------------------------------------------------- division


def divided(rank: int, world_size: int) -> dict[bool, float]:
    seen = {}
    for division in (True, False, True):
        set_gradient_division(division)
        constraints = {"item": dynamic(initializer_args=ZEROS)}
        model = distribute(collection(table("item")), constraints, (torch.optim.SGD, {"lr": 1.0}))
        train_step(model, features_of({"item": [[5, 5], [7]]}))
        row = evaluated(model, {"item": torch.tensor([5])})["item"]
        assert (row == row[0, 0]).all()
        seen[division] = float(row[0, 0])
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradient_division(world_size: int) -> None:
    """Key 5 comes twice on each rank."""
    assert run_on_ranks(world_size, divided) == [{True: -2.0, False: -2.0 * world_size}] * world_size


# ------------------------------------------------------------------------------------------- sub-groups


def on_group(rank: int, world_size: int, members: list[int]) -> Optional[dict[str, Any]]:
    """The other ranks take part in nothing: a collective over all of them would hang."""
    group = dist.new_group(members)
    if rank not in members:
        return None
    model = build(group=group)
    train(model, dist.get_rank(group))
    tables = [vars(entry.stored_rows(index)) for entry in groups(model) for index in range(len(entry.configs))]
    return {"rows": evaluated(model, ALL), "statistics": table_statistics(model), "tables": tables}


@pytest.mark.parametrize("members", [[0, 1], [1, 2], [0, 2], [2]])
def test_only_the_given_group_is_used(members: list[int]) -> None:
    expected = run_on_ranks(len(members), on_group, list(range(len(members))))
    results = run_on_ranks(3, on_group, members)
    assert [rank for rank, result in enumerate(results) if result is not None] == members
    for rank, result in enumerate(results[member] for member in members):
        assert result is not None and expected[rank] is not None
        assert result["statistics"] == expected[rank]["statistics"]
        assert all(torch.equal(result["rows"][name], expected[rank]["rows"][name]) for name in ALL)
        for own, other in zip(result["tables"], expected[rank]["tables"], strict=True):
            assert torch.equal(own["slots"], other["slots"]) and torch.equal(own["scores"], other["scores"])


# ------------------------------------------------------------------------------------------- pipelines


class Batch(Pipelineable):
    def __init__(self, features: KeyedJaggedTensor) -> None:
        self.features = features

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(self.features.to(device, non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)

    def pin_memory(self) -> Batch:
        return self


class Model(nn.Module):
    """Returns (loss, anything), as torchrec's pipelines expect."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = collection(*(table(name, 60) for name in ALL))
        self.dense = nn.Linear(8, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = self.embeddings(batch.features)
        values = {name: output[name].values() for name in ALL}
        loss = torch.cat([self.dense(value).sin() for value in values.values()]).sum()
        return loss, {name: value.detach().clone() for name, value in values.items()}


def pipelined(rank: int, world_size: int, pipeline_class: type) -> tuple[list[Any], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    constraints = {
        "item": dynamic(initializer_args=NORMAL, max_capacity=128, bucket_capacity=16, init_capacity=16),
        "user": dynamic(initializer_args=NORMAL, max_capacity=16, bucket_capacity=16),
        "country": STATIC,
    }
    model = distribute(Model(), constraints, ADAGRAD)
    for key, value in model.state_dict().items():
        if "country" in key:
            value.local_shards()[0].tensor.fill_(0.25)
    optimizer = torch.optim.SGD(model.module.dense.parameters(), lr=0.01)
    pipeline = pipeline_class(model, optimizer, CPU)
    batches = iter([Batch(make_batch(rank, step, samples=0 if step == 3 and rank == 0 else 8)) for step in range(8)])
    seen = []
    while True:
        try:
            seen.append(pipeline.progress(batches))
        except StopIteration:
            break
    assert len(seen) == 8
    if pipeline_class is TrainPipelineSparseDist:
        assert len(pipeline._pipelined_modules) == 1
        pipeline.detach()
    model.eval()
    return seen, rows(model.module.embeddings, one_sample(ALL))


def test_train_pipeline() -> None:
    """Batches are distributed while earlier ones are trained; what is looked up and learnt must not change."""
    by_pipeline = [run_on_ranks(2, pipelined, pipeline) for pipeline in (TrainPipelineBase, TrainPipelineSparseDist)]
    for plain, ahead in zip(*by_pipeline):
        for first, second in zip(plain[0], ahead[0], strict=True):
            assert all(torch.equal(first[name], second[name]) for name in ALL)
        assert all(torch.equal(plain[1][name], ahead[1][name]) for name in ALL)


def split_protocol(rank: int, world_size: int) -> None:
    """What pipelines are made of: input distribution of the next batch before the lookup of this one."""
    model, other = build(), build()
    sharded = other.module
    contexts = [sharded.create_context() for _ in range(4)]
    expected = train(model, rank, 4)
    inputs = [
        sharded.input_dist(context, make_batch(rank, step)).wait().wait()
        for step, context in enumerate(contexts)
    ]  # fmt: skip
    for step, (context, keys) in enumerate(zip(contexts, inputs)):
        output = sharded.output_dist(context, sharded.compute(context, keys))
        values = {name: jagged.values() for name, jagged in output.items()}
        for name in ("item", "user"):
            assert torch.equal(values[name], expected[step][name])
        torch.stack([value.sin().sum() for value in values.values()]).sum().backward()


@pytest.mark.parametrize("world_size", [1, 2])
def test_split_protocol(world_size: int) -> None:
    run_on_ranks(world_size, split_protocol)
