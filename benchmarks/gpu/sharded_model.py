"""The model through TorchRec's ``DistributedModelParallel`` on one rank, dynamic tables beside TorchRec's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from figures import CheckError
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from workload import LEARNING_RATE

from dynamicemb import DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterConstraints
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, table_statistics
from gpu.device import Device
from gpu.ids import Batch, IdSource
from gpu.ranking_model import DENSE_INPUTS, DENSE_RATE, DensePart
from gpu.rounds import Lap, Step, Turns, in_turns
from gpu.tables import INITIALIZER, capacity_for

if TYPE_CHECKING:
    from gpu.model import Size

__all__ = ["measure"]

#: For torchrec's planner, which assumes a smaller GPU.
HBM_SHARE = 0.8


class Model(nn.Module):
    """Loss of a batch; the collection is what gets sharded."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        self.collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=f"t{index}", embedding_dim=size.dim, num_embeddings=size.rows, feature_names=[f"f{index}"]
                )
                for index in range(size.features)
            ],
            device=torch.device("meta"),
        )
        apply_optimizer_in_backward(RowWiseAdagrad, self.collection.parameters(), {"lr": LEARNING_RATE, "eps": 1e-8})
        self.dense_part = DensePart(size.features, size.dim, size.bottom, size.top, device)

    def forward(self, dense: torch.Tensor, features: KeyedJaggedTensor, label: torch.Tensor) -> torch.Tensor:
        rows = [jagged.values() for jagged in self.collection(features).values()]
        logits = self.dense_part(dense, torch.stack(rows, dim=1))
        return nn.functional.binary_cross_entropy_with_logits(logits, label)


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A process group of this process alone: NCCL on a GPU, gloo on the host."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            init_method=(Path(folder) / "ranks").as_uri(),
            rank=0,
            world_size=1,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


class Side:
    """A sharded model with the optimizer of its dense part."""

    def __init__(self, size: Size, device: Device, dynamic: bool) -> None:
        torch.manual_seed(0)
        model = Model(size, device.torch_device)
        planner, sharder = (_dynamic if dynamic else _static)(size, device)
        self.model = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device.torch_device,
            plan=planner.collective_plan(model, [sharder], dist.group.WORLD),
            sharders=[sharder],
        )
        dense = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        self._optimizer = torch.optim.SGD(dense.values(), lr=DENSE_RATE)

    def forward(self, sample: tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]) -> torch.Tensor:
        """The loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = self.model(*sample)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Updates tables and dense part."""
        loss.backward()
        self._optimizer.step()

    def step(self, samples: list[Any]) -> Step:
        """In two phases."""

        def run(index: int, lap: Lap) -> None:
            loss = self.forward(samples[index % len(samples)])
            lap("forward")
            self.backward(loss)
            lap("backward")

        return run


def _topology(device: Device) -> Topology:
    kind = device.torch_device.type
    if kind == "cpu":
        return Topology(world_size=1, compute_device=kind, local_world_size=1)
    return Topology(world_size=1, compute_device=kind, local_world_size=1, hbm_cap=int(HBM_SHARE * device.free_bytes()))


def _static(size: Size, device: Device) -> tuple[Any, Any]:
    constraints = {f"t{index}": ParameterConstraints(sharding_types=["table_wise"]) for index in range(size.features)}
    planner = EmbeddingShardingPlanner(topology=_topology(device), constraints=constraints, debug=False)
    return planner, EmbeddingCollectionSharder(use_index_dedup=False)


def _dynamic(size: Size, device: Device) -> tuple[Any, Any]:
    capacity = capacity_for(size.rows)
    options = DynamicEmbTableOptions(
        max_capacity=capacity,
        init_capacity=capacity,
        initializer_args=INITIALIZER,
    )
    constraints = {
        f"t{index}": DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=options)
        for index in range(size.features)
    }
    planner = DynamicEmbeddingShardingPlanner(topology=_topology(device), constraints=constraints, debug=False)
    return planner, DynamicEmbeddingCollectionSharder()


def _features(size: Size, batch: Batch) -> KeyedJaggedTensor:
    """One id for each sample and feature."""
    return KeyedJaggedTensor(
        keys=[f"f{index}" for index in range(size.features)],
        values=batch.ids,
        lengths=torch.ones_like(batch.ids),
    )


def _check(dynamic: Side, size: Size) -> None:
    """Raises: CheckError: the dynamic tables do not hold every id."""
    for name, statistics in table_statistics(dynamic.model).items():
        if statistics.size != size.rows or statistics.evicted:
            raise CheckError(f"table {name} holds {statistics.size} of {size.rows} ids")


def _insert_every(side: Side, size: Size, source: IdSource) -> None:
    """Through the collection, as training would."""
    device = source.device
    for first in range(0, size.rows, size.batch):
        count = min(size.batch, size.rows - first)
        features = _features(size, source.every(first, count))
        side.model(torch.zeros(count, DENSE_INPUTS, device=device), features, torch.zeros(count, device=device))


def measure(device: Device, size: Size, deadline: float) -> Turns:
    """Steps of both sides in turn, named ``dynamic`` and ``static``, in the phases ``forward`` and ``backward``.

    Raises:
        CheckError: the dynamic tables do not hold every id.
    """
    source = IdSource(size.features, size.rows, device.torch_device)
    samples = []
    for _ in range(size.batches):
        dense = torch.rand(size.batch, DENSE_INPUTS, device=device.torch_device)
        samples.append((dense, _features(size, source.power_law(size.batch)), (dense[:, 0] > 0.5).float()))
    with one_rank(device.torch_device):
        dynamic, static = Side(size, device, dynamic=True), Side(size, device, dynamic=False)
        _insert_every(dynamic, size, source)
        _check(dynamic, size)
        contenders = {"dynamic": dynamic.step(samples), "static": static.step(samples)}
        return in_turns(device, contenders, size.rounds, size.warm_up, deadline)
