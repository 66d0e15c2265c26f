"""A sharded collection of one process that has no process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torchrec.distributed.types import ShardingEnv

from dynamicemb import DynamicEmbTableOptions
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, ShardedDynamicEmbeddingCollection
from tests.shard.models import CPU, ZEROS, collection, table


@contextmanager
def no_process_group() -> Iterator[None]:
    """Inside it, a rank of a test that has only one rank is a process without a group."""
    dist.destroy_process_group()
    try:
        yield
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def alone() -> ShardedDynamicEmbeddingCollection:
    """A table ``t0`` of eight columns that is trained by SGD."""
    options = DynamicEmbTableOptions(
        dim=8, embedding_dtype=torch.float32, max_capacity=256, initializer_args=ZEROS, eval_initializer_args=ZEROS
    )
    plan = {
        "t0": DynamicEmbParameterSharding(
            sharding_type="row_wise", compute_kernel="customized_kernel", ranks=[0], dynamicemb_options=options
        )
    }
    sharder = DynamicEmbeddingCollectionSharder(fused_params={"learning_rate": 1.0})
    return sharder.shard(collection(table("t0")), plan, ShardingEnv.from_local(1, 0), CPU)
