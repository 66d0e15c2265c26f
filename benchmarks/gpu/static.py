"""fbgemm's table-batched embedding with static tables. Where it cannot be loaded, our own side is measured alone."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.table.optimizers import OptimizerConfig
from gpu.ids import IdSource
from gpu.tables import DynamicTables, slices

__all__ = ["static_bytes", "static_tables", "why_no_static"]

#: Names of fbgemm's ``OptimType``.
_STATIC_OPTIMIZERS = {
    OptimizerKind.SGD: "EXACT_SGD",
    OptimizerKind.ROWWISE_ADAGRAD: "EXACT_ROWWISE_ADAGRAD",
    OptimizerKind.ADAM: "ADAM",
}


def static_bytes(tables: int, rows: int, dim: int, kind: OptimizerKind) -> int:
    """Memory of static tables: rows and optimizer state, unpadded."""
    return tables * rows * (dim + RowLayout(dim, torch.float32, kind).state_width) * 4


@functools.cache
def _fbgemm() -> Any:
    """The module with the tables, or the error that its import ends in."""
    try:
        return importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    except Exception as error:
        return error


def why_no_static(kind: OptimizerKind, device: torch.device) -> str:
    """Why fbgemm does not update rows by this rule there; nothing if it does."""
    if kind not in _STATIC_OPTIMIZERS or (device.type == "cpu" and kind is OptimizerKind.ADAM):
        return "fbgemm has no such optimizer on the CPU"
    if isinstance(error := _fbgemm(), Exception):
        return f"fbgemm cannot be loaded: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def static_tables(dynamic: DynamicTables, source: IdSource, optimizer: OptimizerConfig, device: torch.device) -> Any:
    """Static tables with the rows that ``dynamic`` holds for the ids of ``source``, which are their row numbers.

    fbgemm's checks of the ids are off, which costs it one launch less.

    Returns:
        a ``SplitTableBatchedEmbeddingBagsCodegen`` without pooling.
    """
    fbgemm, host = _fbgemm(), device.type == "cpu"
    if isinstance(fbgemm, Exception):
        raise fbgemm
    where, computes = fbgemm.EmbeddingLocation, fbgemm.ComputeDevice
    place = (where.HOST, computes.CPU) if host else (where.DEVICE, computes.CUDA)
    module = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
        [(source.universe, dynamic.dim, *place)] * source.tables,
        optimizer=fbgemm.OptimType[_STATIC_OPTIMIZERS[optimizer.kind]],
        learning_rate=optimizer.learning_rate,
        eps=optimizer.eps,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        pooling_mode=fbgemm.PoolingMode.NONE,
        bounds_check_mode=fbgemm.BoundsCheckMode.NONE,
        device=device,
    )
    weights = module.split_embedding_weights()
    for first, count in slices(source.universe, 1 << 18):
        rows = dynamic.read(source.every(first, count)).view(source.tables, count, dynamic.dim)
        for table, weight in enumerate(weights):
            weight[first : first + count].copy_(rows[table])
    return module
