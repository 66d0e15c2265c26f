"""Rows of a static TorchRec table as the first rows of a dynamic one: row i becomes the row of id i."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.checkpoint.selection import TableNames, selected_tables
from dynamicemb.errors import CheckpointError, DynamicEmbWarning
from dynamicemb.kernels.hashing import mix64, owners, sortable
from dynamicemb.shard.state_dict import WEIGHT, is_dynamic
from dynamicemb.shard.tables import DynamicTable, all_ranks
from dynamicemb.table.filling import HostRows, TableFilling

__all__ = ["load_static"]

#: Ids that are looked at together while a rank finds those that it owns.
_SCANNED_IDS = 1 << 20
#: Bytes of rows that a rank asks for at a time. It may be asked for as much by every other rank.
_PIECE_BYTES = 8 << 20


def load_static(model: nn.Module, state_dict: Mapping[str, Any], table_names: TableNames = None) -> None:
    """Replaces dynamic tables by the rows of static ones of the same names. All ranks call it together.

    Optimizer state begins anew, the table's count of updates with it; scores are 0, and the clock and the counts of
    events stay as they are. Rows travel in pieces, and each rank holds 8 bytes for each id that it owns besides.

    Args:
        model: the sharded model, wrapped or not.
        state_dict: of a model with static tables: ``<...>embeddings.<table>.weight`` is a tensor [ids, dim] of all
            rows, or a ``ShardedTensor`` or ``DTensor`` of which every rank has whatever part it has, sharded in any
            way. Rows are converted to the dtype of the dynamic table.
        table_names: tables by path of their collection, the model itself being called ``model``; None: all.

    Raises:
        ConfigError: the model has no such dynamic tables.
        CheckpointError: rows of a table are missing, of another dim, or those of a dynamic table. No table has changed.
        RemoteRankError: that happened on another rank.
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    tables = selected_tables(model, table_names)
    with all_ranks("load_static()", tables):
        sources = [_Source.of(table, state_dict) for table in tables]
        for table, source in zip(tables, sources, strict=True):
            _replace(table, source)


# ---------------------------------------------------------------------------------------------------- source


#: First row, first column, rows, columns.
_Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Block:
    """A rectangle of a static table: what one shard holds. ``rank`` has it."""

    rank: int
    first_row: int
    first_column: int
    rows: int
    columns: int

    @property
    def place(self) -> _Place:
        return self.first_row, self.first_column, self.rows, self.columns

    def overlaps(self, other: _Block) -> bool:
        return (
            self.first_row < other.first_row + other.rows
            and other.first_row < self.first_row + self.rows
            and self.first_column < other.first_column + other.columns
            and other.first_column < self.first_column + self.columns
        )


def _key(table: DynamicTable, state_dict: Mapping[str, Any]) -> str:
    """The entry of ``state_dict`` that belongs to ``table``: that of the same path, else the only one of its name."""
    suffix = f"embeddings.{table.name}.weight"
    found = [key for key in state_dict if key == suffix or key.endswith(f".{suffix}")]
    path = table.collection.partition(".")[2]
    exact = f"{path}.{suffix}" if path else suffix
    if exact in found:
        return exact
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"table '{table.name}': the state dict has no entry '{exact}' nor another '...{suffix}'; "
            "name the tables that it has in table_names"
        )
    raise CheckpointError(
        f"table '{table.name}': {sorted(found)} of the state dict could be meant; rename the right one to '{exact}'"
    )


def _shards(value: Any) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], torch.Tensor]]]:
    """The size of the whole tensor, and (offsets, values) of each part of it that is here."""
    if isinstance(value, ShardedTensor):
        size = tuple(value.metadata().size)
        return size, [(tuple(shard.metadata.shard_offsets), shard.tensor.detach()) for shard in value.local_shards()]
    if isinstance(value, DTensor):
        local: Any = value.to_local()
        if hasattr(local, "local_shards"):  # torchrec's, which may have several parts, or none and yet an offset
            parts = zip(local.local_offsets(), local.local_shards(), strict=False)
            return tuple(value.shape), [(tuple(offsets), part.detach()) for offsets, part in parts]
        _, start = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        return tuple(value.shape), [(tuple(start), local.detach())]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), [((0,) * value.dim(), value.detach())]
    raise CheckpointError(f"a {type(value).__name__} is no tensor")


@dataclass(frozen=True)
class _Source:
    """A static table that is spread over ranks.

    Attributes:
        rows: ids.
        blocks: distinct parts that make up the table, the same on every rank; of what several ranks have, the first's.
        everywhere: places of the blocks that all ranks have.
        parts: values of this rank by place.
    """

    rows: int
    blocks: list[_Block]
    everywhere: set[_Place]
    parts: dict[_Place, torch.Tensor]

    @staticmethod
    def of(table: DynamicTable, state_dict: Mapping[str, Any]) -> _Source:
        """What all ranks have of ``table``. All ranks call it together."""
        ranks = Ranks(table.process_group)
        dim = table.group.storage.layout.dim
        parts: dict[_Place, torch.Tensor] = {}

        def describe() -> tuple[tuple[int, ...], list[_Block]]:
            key = _key(table, state_dict)
            if is_dynamic(state_dict, key.removesuffix(WEIGHT)):
                raise CheckpointError(
                    f"table '{table.name}': the rows of '{key}' are those of a dynamic table, in the order of their "
                    "hash; load them with model.load_state_dict"
                )
            try:
                size, shards = _shards(state_dict[key])
            except CheckpointError as error:
                raise CheckpointError(f"table '{table.name}', entry '{key}': {error}") from None
            if len(size) != 2 or size[1] != dim:
                raise CheckpointError(
                    f"table '{table.name}', entry '{key}': its shape is {list(size)}, the dynamic table has rows of "
                    f"{dim} values; the dims must be the same"
                )
            parts.update({(*offsets, *values.shape): values for offsets, values in shards if values.numel()})
            return size, [_Block(ranks.rank, *place) for place in parts]

        described = ranks.together(describe)
        sizes = sorted({size for size, _ in described})
        if len(sizes) > 1:
            raise CheckpointError(f"table '{table.name}': its shape differs between ranks: {sizes}")
        blocks = _distinct([block for _, own in described for block in own])
        _check_cover(table.name, sizes[0], blocks)
        everywhere = set.intersection(*({block.place for block in own} for _, own in described))
        return _Source(sizes[0][0], blocks, everywhere, parts)


def _distinct(blocks: list[_Block]) -> list[_Block]:
    """One block for each place, that of the first rank that has it. The same on every rank."""
    by_place: dict[_Place, _Block] = {}
    for block in sorted(blocks, key=lambda block: (block.place, block.rank)):
        by_place.setdefault(block.place, block)
    return list(by_place.values())


def _check_cover(table: str, size: tuple[int, ...], blocks: list[_Block]) -> None:
    values = sum(block.rows * block.columns for block in blocks)
    overlap = any(one.overlaps(other) for number, one in enumerate(blocks) for other in blocks[:number])
    if values != size[0] * size[1] or overlap:
        raise CheckpointError(
            f"table '{table}': its shape is {list(size)}, but the shards of all ranks together have {values} values"
            f"{', some of them twice' if overlap else ''}; call this on all the ranks that the state dict is spread "
            "over"
        )


# ---------------------------------------------------------------------------------------------------- rows


def _replace(table: DynamicTable, source: _Source) -> None:
    ranks, layout = Ranks(table.process_group), table.group.storage.layout
    ids = _own_ids(source.rows, ranks)
    progress = dataclasses.replace(table.group.progress(table.index), steps=0)
    filling = TableFilling(table.group, table.index, ids.numel())
    piece_rows = max(1, _PIECE_BYTES // (layout.dim * 4))
    for number in range(max(ranks.gather(-(-ids.numel() // piece_rows)))):
        wanted = ids[number * piece_rows : (number + 1) * piece_rows]
        embeddings = _read(source, wanted, layout.embedding_dtype, table, ranks)
        filling.add(HostRows(wanted, torch.zeros_like(wanted), embeddings, {}))
    filling.finish()
    table.group.restore(table.index, progress, filling.kept)
    left_out = sum(ranks.gather(filling.left_out))
    if left_out:
        warnings.warn(
            f"table '{table.name}': {left_out} of {source.rows} rows of the static table found no place; "
            "raise its capacity",
            DynamicEmbWarning,
            stacklevel=3,
        )


def _own_ids(rows: int, ranks: Ranks) -> torch.Tensor:
    """int64 [n]: which of the ids from 0 to ``rows`` this rank owns, in ascending order of the mixed key."""
    found = [torch.empty(0, dtype=torch.int64)]
    for first in range(0, rows, _SCANNED_IDS):
        ids = torch.arange(first, min(first + _SCANNED_IDS, rows))
        found.append(ids[owners(ids, ranks.size) == ranks.rank])
    ids = torch.cat(found)
    return ids[torch.argsort(sortable(mix64(ids)))]


def _read(source: _Source, ids: torch.Tensor, dtype: torch.dtype, table: DynamicTable, ranks: Ranks) -> torch.Tensor:
    """The rows of ``ids``, [n, dim] in ``dtype``, from whoever has them. All ranks call it together."""
    result = torch.empty(ids.numel(), table.group.storage.layout.dim, dtype=dtype)
    for block in source.blocks:
        positions = ((ids >= block.first_row) & (ids < block.first_row + block.rows)).nonzero().squeeze(1)
        offsets = ids[positions] - block.first_row
        values = _from_block(source, block, offsets, dtype, table, ranks)
        result[positions, block.first_column : block.first_column + block.columns] = values
    return result


def _from_block(
    source: _Source, block: _Block, offsets: torch.Tensor, dtype: torch.dtype, table: DynamicTable, ranks: Ranks
) -> torch.Tensor:
    """Rows ``offsets`` of a block, [n, columns] in ``dtype``, from this rank if it has the block."""

    def rows(part: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return part[offsets.to(part.device)].cpu().to(dtype)

    part = source.parts.get(block.place)
    own = None if part is None else rows(part, offsets)
    if block.place in source.everywhere:
        assert own is not None
        return own
    nothing = offsets[:0]
    asked = [nothing if own is not None or rank != block.rank else offsets for rank in range(ranks.size)]
    answers = [
        torch.empty(0, block.columns, dtype=dtype) if part is None else rows(part, wanted)
        for wanted in _exchanged(asked, table)
    ]
    # As bytes: not every backend sends every dtype.
    received = _exchanged([answer.view(torch.uint8) for answer in answers], table)
    return received[block.rank].view(dtype) if own is None else own


def _exchanged(pieces: list[torch.Tensor], table: DynamicTable) -> list[torch.Tensor]:
    """``pieces[r]`` goes to rank r; what came from each rank, in host memory. Several ranks only."""
    pg, device = table.process_group, table.group.device
    counts = torch.tensor([piece.shape[0] for piece in pieces], device=device)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=pg)
    sent, received_counts = torch.cat(pieces).to(device), arriving.tolist()
    received = sent.new_empty(sum(received_counts), *sent.shape[1:])
    dist.all_to_all_single(received, sent, received_counts, counts.tolist(), group=pg)
    return list(received.cpu().split(received_counts))
