"""A training step of a sharded collection of one rank, with tables at capacity, makes nobody wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import DynamicEmbEvictStrategy
from tests.gpu.guards import steady_state
from tests.gpu.scale import SCALES, Scale

pytest.importorskip("fbgemm_gpu")
pytest.importorskip("torchrec")

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import NORMAL, collection, distribute, dynamic, rank_device, rows, table

STEPS = 4
#: Steps that compile kernels, and that fill the tables.
WARM_UP = 6
TABLES = ("item", "user", "tag")


def host_batch(samples: int, number: int) -> KeyedJaggedTensor:
    """Lengths are known on the host, as a data loader knows them; "user" has no ids in every other batch."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(0, 4, (len(TABLES), samples), generator=generator)
    if number % 2:
        lengths[1] = 0
    ids = torch.randint(0, 4000, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys=list(TABLES), values=ids, lengths=lengths.flatten()).sync()


def sharded_steps(rank: int, world_size: int, samples: int) -> dict[str, Any]:
    """Trains a collection with two groups of tables at capacity; returns its statistics."""
    options: dict[str, Any] = {"max_capacity": 1024, "init_capacity": 1024, "initializer_args": NORMAL}
    constraints = {
        "item": dynamic(**options),
        "user": dynamic(**options),
        "tag": dynamic(evict_strategy=DynamicEmbEvictStrategy.LFU, **options),
    }
    model = distribute(collection(*(table(name) for name in TABLES)), constraints, (torch.optim.Adam, {"lr": 0.01}))
    device = rank_device()
    batches = [host_batch(samples, number).to(device) for number in range(WARM_UP + STEPS)]
    for number, batch in enumerate(batches):
        if number < WARM_UP:
            sharded_step(model, batch)
            continue
        with steady_state(device):
            sharded_step(model, batch)
    return table_statistics(model)


def sharded_step(model: nn.Module, batch: KeyedJaggedTensor) -> None:
    output = rows(model, batch)
    torch.stack([values.square().sum() for values in output.values()]).sum().backward()


@pytest.mark.parametrize("scale", SCALES)
def test_sharded_collection_of_one_rank(scale: Scale) -> None:
    samples = 4096 if scale.full else 512
    expected = run_on_ranks(1, sharded_steps, samples, backend="gloo")
    for counted in expected[0].values():
        assert counted.evicted > 0 and counted.hits > 0, expected
    if scale.full:
        assert run_on_ranks(1, sharded_steps, samples, backend="nccl") == expected
