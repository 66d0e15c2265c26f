"""fbgemm's table-batched embedding with static tables; apart, because only comparisons with it need fbgemm."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    OptimType,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.table.optimizers import OptimizerConfig
from gpu.ids import IdSource
from gpu.tables import DynamicTables, slices

__all__ = ["has_static_rule", "static_bytes", "static_tables"]

_STATIC_OPTIMIZERS = {
    OptimizerKind.SGD: OptimType.EXACT_SGD,
    OptimizerKind.ROWWISE_ADAGRAD: OptimType.EXACT_ROWWISE_ADAGRAD,
    OptimizerKind.ADAM: OptimType.ADAM,
}


def static_bytes(tables: int, rows: int, dim: int, kind: OptimizerKind) -> int:
    """Memory of static tables: rows and optimizer state, unpadded."""
    return tables * rows * (dim + RowLayout(dim, torch.float32, kind).state_width) * 4


def has_static_rule(kind: OptimizerKind, device: torch.device) -> bool:
    """Whether fbgemm updates rows by this rule there: on the CPU it has no Adam."""
    return kind in _STATIC_OPTIMIZERS and (device.type != "cpu" or kind is not OptimizerKind.ADAM)


def static_tables(dynamic: DynamicTables, source: IdSource, optimizer: OptimizerConfig, device: torch.device) -> Any:
    """Static tables with the rows that ``dynamic`` holds for the ids of ``source``, which are their row numbers.

    fbgemm's checks of the ids are off, which costs it one launch less.

    Returns:
        a ``SplitTableBatchedEmbeddingBagsCodegen`` without pooling.
    """
    host = device.type == "cpu"
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU) if host else (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(source.universe, dynamic.dim, *place)] * source.tables,
        optimizer=_STATIC_OPTIMIZERS[optimizer.kind],
        learning_rate=optimizer.learning_rate,
        eps=optimizer.eps,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        pooling_mode=PoolingMode.NONE,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
    )
    weights = module.split_embedding_weights()
    for first, count in slices(source.universe, 1 << 18):
        rows = dynamic.read(source.every(first, count)).view(source.tables, count, dynamic.dim)
        for table, weight in enumerate(weights):
            weight[first : first + count].copy_(rows[table])
    return module
