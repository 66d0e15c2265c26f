"""Rows that several ranks hold one range of each, as ``torch.distributed.checkpoint`` wants to see them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed._shard.api import _get_current_process_group
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties

from dynamicemb.errors import CheckpointError

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


class _RowsSize(tuple[int, ...]):
    """The size of rows of a dynamic table, which says in f-strings what there is to know about it.

    ``torch.distributed.checkpoint.load`` needs sizes to be right beforehand, and shows them if they are not: "Size
    mismatch between saved ... and current: ...". torch has no other place where its users could be told what to do.
    """

    def numel(self) -> int:
        return math.prod(self)

    def __format__(self, spec: str) -> str:
        return (
            f"{torch.Size(self)}, since the model has other rows in this dynamic table than the checkpoint, which "
            "dynamicemb.checkpoint.dcp.load(model, checkpoint_id) loads,"
        )


class StagedShardedTensor(ShardedTensor):
    """A ``ShardedTensor`` that ``async_save`` can copy, and ``torch.load`` read with ``weights_only=True``.

    The default stager (seen in torch 2.13) copies a tensor by its memory, of which a ``ShardedTensor`` has none itself,
    and then the attributes of the object, among them its process group, and fails on both.
    """

    #: Whether these are rows of a dynamic table, not of a static one.
    is_dynamic = False

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

    def size(self, dim: Optional[int] = None) -> Any:
        size = self.metadata().size
        if dim is not None:
            return size[dim]
        return _RowsSize(size) if self.is_dynamic else size

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain tensor if all shards are here, so that whoever has torch can read it; else what :func:`_rebuilt`
        takes: plain tensors and numbers."""
        pg, metadata = self._process_group, self.metadata()
        shards = [(shard.tensor.detach(), list(shard.metadata.shard_offsets)) for shard in self.local_shards()]
        if pg.size() == 1:
            return _joined(metadata.size, metadata.tensor_properties.dtype, shards).__reduce_ex__(protocol)
        places = [
            (list(part.shard_offsets), list(part.shard_sizes), str(part.placement)) for part in metadata.shards_metadata
        ]
        return _rebuilt, (
            shards,
            places,
            list(metadata.size),
            metadata.tensor_properties.dtype,
            self.is_dynamic,
            pg.rank(),
            pg.size(),
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


def _joined(size: torch.Size, dtype: torch.dtype, shards: list[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
    if len(shards) == 1 and shards[0][0].shape == size:
        return shards[0][0]
    device = shards[0][0].device if shards else torch.device("cpu")
    whole = torch.empty(size, dtype=dtype, device=device)
    for values, offsets in shards:
        whole[tuple(slice(first, first + count) for first, count in zip(offsets, values.shape, strict=True))] = values
    return whole


def _rebuilt(
    shards: list[tuple[torch.Tensor, list[int]]],
    places: list[tuple[list[int], list[int], str]],
    size: list[int],
    dtype: torch.dtype,
    is_dynamic: bool,
    rank: int,
    world_size: int,
) -> StagedShardedTensor:
    """What a rank saved with ``torch.save``, on the same rank of as many; ``torch.load`` calls it."""
    where = f"rank {rank} of {world_size} saved this part of its model with torch.save"
    remedy = "torch.distributed.checkpoint and DynamicEmbDump save for any number of ranks"
    if not dist.is_initialized():
        raise CheckpointError(f"{where}: initialize a process group of as many ranks before torch.load; {remedy}")
    pg = _get_current_process_group()
    if (pg.rank(), pg.size()) != (rank, world_size):
        raise CheckpointError(
            f"{where}, but here is rank {pg.rank()} of {pg.size()}: as many ranks must load their own files (inside "
            f"load_with_process_group, if the model is not on all ranks); {remedy}"
        )
    own = {tuple(offsets): values for values, offsets in shards}
    parts, local = [], []
    for offsets, sizes, placement in places:
        part = ShardMetadata(list(offsets), list(sizes), placement=placement)
        if part.placement.rank() == dist.get_rank() and tuple(offsets) in own:  # type: ignore[union-attr]
            values = own[tuple(offsets)]
            part = ShardMetadata(list(offsets), list(sizes), placement=f"rank:{dist.get_rank()}/{values.device}")
            local.append(Shard(values, part))
        parts.append(part)
    metadata = ShardedTensorMetadata(
        shards_metadata=parts, size=torch.Size(size), tensor_properties=TensorProperties(dtype=dtype)
    )
    tensor = ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata, process_group=pg)
    result = StagedShardedTensor.of(tensor)
    result.is_dynamic = is_dynamic
    return result


torch.serialization.add_safe_globals([_rebuilt])


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
    tensor = ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=pg)
    result = StagedShardedTensor.of(tensor)
    result.is_dynamic = True
    return result
