"""Sharded collections of one process that has no process group: for tests that need no processes of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Optional

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


def alone(
    *names: str, frozen: Collection[str] = (), fused_params: Optional[dict[str, Any]] = None, **options: Any
) -> ShardedDynamicEmbeddingCollection:
    """Tables of eight columns that begin at zero and are trained by SGD with learning rate 1.

    Args:
        names: of the tables; none: a table ``t0``.
        frozen: names of those whose parameters require no gradient in the collection that is sharded.
        fused_params: other than that.
        options: of all tables.
    """
    names = names or ("t0",)
    shared = {"max_capacity": 256, "initializer_args": ZEROS, "eval_initializer_args": ZEROS, **options}
    plan = {
        name: DynamicEmbParameterSharding(
            sharding_type="row_wise",
            compute_kernel="customized_kernel",
            ranks=[0],
            dynamicemb_options=DynamicEmbTableOptions(dim=8, embedding_dtype=torch.float32, **shared),
        )
        for name in names
    }
    sharder = DynamicEmbeddingCollectionSharder(fused_params=fused_params or {"learning_rate": 1.0})
    module = collection(*map(table, names))
    for name in frozen:
        module.embeddings[name].weight.requires_grad_(False)
    return sharder.shard(module, plan, ShardingEnv.from_local(1, 0), CPU)
