"""Memory and time of dynamic tables, by way of torchrec's estimators.

Those know neither the customized kernel nor a hash table, but they do know the input and output buffers, the topology
and the pipeline. So each dynamic table is put to them as a *probe*: the same option with the kernel of static tables
and one row for each rank. From the answer the row of the probe is taken away, and the hash table is added.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Optional

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage

from dynamicemb.planner.tables import DynamicTable

__all__ = ["apply_probe", "probe_for"]

# Bytes of an id in torchrec's estimates, and of the key and the score (read, written) that a lookup touches.
_ID_BYTES = 8
_KEY_AND_SCORE_BYTES = 8 + 2 * 8


def probe_for(option: ShardingOption) -> ShardingOption:
    """A static table of one row for each shard of ``option``, for torchrec's estimators to fill in."""
    dim = option.tensor.shape[1]
    probe = copy.deepcopy(option)  # torchrec's own deepcopy shares tensor and module
    # A private attribute, because the constructor's arguments differ between torchrec's versions. The new tensor
    # carries no optimizer, so the estimate holds exactly one row of weights for each shard.
    probe._tensor = torch.empty(option.num_shards, dim, dtype=option.tensor.dtype, device="meta")
    probe.compute_kernel = EmbeddingComputeKernel.FUSED.value
    probe.stash_weights = False  # of torchrec 1.9: rows of dynamic tables stay where they are
    probe.shards = [Shard(size=[1, dim], offset=[index, 0]) for index in range(option.num_shards)]
    return probe


def apply_probe(option: ShardingOption, probe: ShardingOption, table: DynamicTable, compute_device: str) -> None:
    """Fill in storage and perf of the shards of ``option`` from its estimated ``probe``."""
    probe_row_bytes = option.tensor.shape[1] * option.tensor.element_size()
    option.is_weighted = probe.is_weighted
    for shard, estimate in zip(option.shards, probe.shards, strict=True):
        shard.storage = _storage(estimate.storage, table.total_bytes - probe_row_bytes, compute_device)
        shard.perf = _perf(estimate.perf, table, probe_row_bytes)


def _storage(estimate: Optional[Storage], added_bytes: int, compute_device: str) -> Storage:
    estimate = estimate or Storage(hbm=0, ddr=0)
    if compute_device == "cpu":
        return dataclasses.replace(estimate, ddr=max(0, estimate.ddr + added_bytes))
    return dataclasses.replace(estimate, hbm=max(0, estimate.hbm + added_bytes))


def _perf(estimate: Optional[Perf], table: DynamicTable, row_bytes: int) -> Optional[Perf]:
    """Torchrec counts an id, a row read and a row written for each lookup; a hash table reads digests and a key too."""
    if estimate is None:
        return None
    static_bytes = _ID_BYTES + 2 * row_bytes
    probing_bytes = table.options.bucket_capacity + _KEY_AND_SCORE_BYTES
    return dataclasses.replace(estimate, fwd_compute=estimate.fwd_compute * (1 + probing_bytes / static_bytes))
