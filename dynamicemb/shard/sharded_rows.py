"""Rows that several ranks hold one range of each, as ``torch.distributed.checkpoint`` wants to see them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties

__all__ = ["StagedShardedTensor", "sharded_rows"]

#: Rows of a shard. The readers of ``torch.distributed.checkpoint`` always read whole shards of the file, so this is
#: what a rank reads in vain where its range begins and ends, and what it holds besides its own rows meanwhile.
_SHARD_ROWS = 1 << 17


class _NotCopied:
    """Holds a process group, which nothing can copy."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _NotCopied:
        return self


class StagedShardedTensor(ShardedTensor):
    """A ``ShardedTensor`` that ``async_save`` can copy.

    The default stager (seen in torch 2.13) copies a tensor by its memory, of which a ``ShardedTensor`` has none itself,
    and then the attributes of the object, among them its process group, and fails on both.
    """

    @staticmethod
    def of(tensor: ShardedTensor) -> StagedShardedTensor:
        """The same shards, in the same memory."""
        if isinstance(tensor, StagedShardedTensor):
            return tensor
        metadata = tensor.metadata()
        result = StagedShardedTensor._like(tensor)
        result._local_shards = tensor.local_shards()
        result._metadata = metadata
        result._prepare_init(process_group=tensor._process_group)
        return result

    @staticmethod
    def _like(tensor: ShardedTensor) -> StagedShardedTensor:
        properties = tensor.metadata().tensor_properties
        return StagedShardedTensor.__new__(
            StagedShardedTensor,
            tensor.sharding_spec(),
            tensor.metadata().size,
            dtype=properties.dtype,
            layout=properties.layout,
            pin_memory=properties.pin_memory,
            requires_grad=properties.requires_grad,
        )

    @property
    def _process_group(self) -> dist.ProcessGroup:
        return self._group_holder.group

    @_process_group.setter
    def _process_group(self, group: dist.ProcessGroup) -> None:
        self._group_holder = _NotCopied(group)

    def data_ptr(self) -> int:
        """0: no memory of its own. The stager then copies nothing but the attributes."""
        return 0

    def new_empty(self, *size: Any, **options: Any) -> StagedShardedTensor:
        """One with the same shape and without shards, for the stager to fill in."""
        return StagedShardedTensor._like(self)


def _metadata(counts: Sequence[int], row_shape: Sequence[int], pg: dist.ProcessGroup) -> list[list[ShardMetadata]]:
    """Of the shards of each rank.

    A rank without rows has no shard: one of no rows would begin where that of the next rank begins, and a checkpoint
    tells shards by where they begin. If there are no rows at all, the first rank has an empty shard, since a tensor
    must have one.
    """
    zeros = [0] * len(row_shape)
    starts = itertools.accumulate(counts, initial=0)
    result = []
    for rank, (start, count) in enumerate(zip(starts, counts, strict=False)):
        placement = f"rank:{dist.get_global_rank(pg, rank)}/cpu"
        offsets = range(0, count, _SHARD_ROWS) if sum(counts) or rank else [0]
        result.append(
            [
                ShardMetadata(
                    [start + offset, *zeros], [min(_SHARD_ROWS, count - offset), *row_shape], placement=placement
                )
                for offset in offsets
            ]
        )
    return result


def sharded_rows(rows: torch.Tensor, counts: Sequence[int], pg: Optional[dist.ProcessGroup]) -> torch.Tensor:
    """The rows of all ranks, one after the other, as one tensor.

    Args:
        rows: this rank's, [counts[rank], ...], contiguous, in host memory; not copied.
        counts: rows of each rank of ``pg``, the same on all of them.
        pg: the ranks; None: this process alone.

    Returns:
        [sum(counts), ...], a :class:`StagedShardedTensor`, or ``rows`` without a process group. Nothing is exchanged.
    """
    if pg is None:
        return rows
    by_rank = _metadata(counts, rows.shape[1:], pg)
    first = sum(counts[: pg.rank()])
    shards = [
        Shard(rows.narrow(0, part.shard_offsets[0] - first, part.shard_sizes[0]), part) for part in by_rank[pg.rank()]
    ]
    metadata = ShardedTensorMetadata(
        shards_metadata=[part for parts in by_rank for part in parts],
        size=torch.Size([sum(counts), *rows.shape[1:]]),
        tensor_properties=TensorProperties(dtype=rows.dtype),
    )
    return StagedShardedTensor.of(
        ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=pg)
    )
