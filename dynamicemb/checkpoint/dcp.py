"""Loading a ``torch.distributed.checkpoint`` (DCP) into a model with dynamic tables, at any number of ranks.

Saving needs nothing of ours::

    torch.distributed.checkpoint.save({"model": model.state_dict(), "step": step}, checkpoint_id=path)

Loading does: DCP loads in place, into tensors whose sizes must be right beforehand, but how many rows a table has, and
which of them belong to which rank, is only known from the checkpoint. :func:`load` does all of it; where a checkpoint
holds more than the model, :func:`sized_state_dict` gives DCP what it needs::

    state = {"model": sized_state_dict(model, path, prefix="model."), "step": 0}
    torch.distributed.checkpoint.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.errors import CheckpointError
from dynamicemb.kernels.hashing import owners
from dynamicemb.shard.sharded_rows import sharded_rows
from dynamicemb.shard.state_dict import KEYS, WEIGHT, EntryDescription, row_entries
from dynamicemb.shard.tables import dynamic_collections

__all__ = ["load", "sized_state_dict"]

CheckpointId = Union[str, "os.PathLike[str]", None]


def load(
    model: nn.Module,
    checkpoint_id: CheckpointId = None,
    *,
    prefix: str = "",
    strict: bool = True,
    storage_reader: Optional[StorageReader] = None,
    process_group: Optional[dist.ProcessGroup] = None,
) -> None:
    """Loads a model from a DCP checkpoint: dynamic tables, static ones, and everything else in its state dict.

    All ranks call it together. Rows of dynamic tables are first read into host memory, each by its owner, and keys are
    read twice; the tables that the model has now are replaced. Other parameters are loaded in place, as DCP does it.

    Args:
        model: the sharded model, wrapped or not.
        checkpoint_id: of the checkpoint, as for ``torch.distributed.checkpoint.load``; a folder.
        prefix: where the state dict of the model is in the checkpoint: ``"model."`` if
            ``{"model": model.state_dict()}`` was saved.
        strict: False leaves alone what the checkpoint does not have, whole dynamic tables included.
        storage_reader: in place of files in the folder ``checkpoint_id``.
        process_group: ranks that load; None: all.

    Raises:
        CheckpointError: a table is missing, is a static one in the checkpoint, or has another dim, dtype or optimizer;
            or its rows are not what they should be. No dynamic table has changed.
        RemoteRankError: that happened on another rank.
    """
    reader = _reader(checkpoint_id, storage_reader)
    state = sized_state_dict(model, prefix=prefix, strict=strict, storage_reader=reader, process_group=process_group)
    loaded = {prefix + name: value for name, value in state.items()}
    dcp.load(loaded, storage_reader=reader, process_group=process_group)
    model.load_state_dict({name: loaded[prefix + name] for name in state}, strict=strict)


def sized_state_dict(
    model: nn.Module,
    checkpoint_id: CheckpointId = None,
    *,
    prefix: str = "",
    strict: bool = True,
    storage_reader: Optional[StorageReader] = None,
    process_group: Optional[dist.ProcessGroup] = None,
) -> dict[str, Any]:
    """The state dict of ``model`` with room for the rows that a checkpoint has, each on the rank that owns it.

    ``torch.distributed.checkpoint.load`` fills it, and ``model.load_state_dict`` takes it then. Arguments and errors
    are those of :func:`load`; the model is not changed.
    """
    reader = _reader(checkpoint_id, storage_reader)
    state = _described_state_dict(model)
    ranks = Ranks(process_group or _all_ranks())
    tables: list[_Table] = []
    known: set[str] = set()

    def read_metadata() -> None:
        metadata = reader.read_metadata()
        known.update(metadata.state_dict_metadata)
        tables.extend(_tables(metadata, state, prefix, strict))

    ranks.together(read_metadata)
    if not strict:
        state = {name: value for name, value in state.items() if prefix + name in known}
    counts = _counts_by_owner(tables, prefix, reader, process_group)
    for table in tables:
        state |= table.empty(counts[table.start])
    return state


def _all_ranks() -> Optional[dist.ProcessGroup]:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _reader(checkpoint_id: CheckpointId, storage_reader: Optional[StorageReader]) -> StorageReader:
    if storage_reader is None:
        if checkpoint_id is None:
            raise CheckpointError("give checkpoint_id, the folder of the checkpoint, or storage_reader")
        return FileSystemReader(checkpoint_id)
    if checkpoint_id is not None:
        storage_reader.reset(checkpoint_id)
    return storage_reader


def _described_state_dict(model: nn.Module) -> dict[str, Any]:
    with ExitStack() as stack:
        for _, collection in dynamic_collections(model):
            stack.enter_context(collection.described_tables())
        return dict(model.state_dict())


# ---------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Table:
    """A table of the model and of the checkpoint.

    Attributes:
        start: what the names of its entries begin with, in the state dict of the model.
        description: of one of its entries.
        rows: in the checkpoint.
        lengths: of the entries that are not rows.
    """

    start: str
    description: EntryDescription
    rows: int
    lengths: dict[str, tuple[int, torch.dtype]]

    @property
    def process_group(self) -> Optional[dist.ProcessGroup]:
        return self.description.process_group

    def empty(self, counts: list[int]) -> dict[str, Any]:
        """All entries, undefined, with ``counts`` rows on each rank."""
        pg = self.process_group
        own = counts[0 if pg is None else pg.rank()]
        layout = self.description.table.layout
        state: dict[str, Any] = {
            self.start + entry.name: sharded_rows(entry.empty(own), counts, pg) for entry in row_entries(layout)
        }
        for name, (length, dtype) in self.lengths.items():
            state[self.start + name] = torch.empty(length, dtype=dtype)
        return state


def _tables(metadata: Metadata, state: Mapping[str, Any], prefix: str, strict: bool) -> list[_Table]:
    """What the checkpoint has of each dynamic table, found to be what the model can take."""
    descriptions: dict[str, dict[str, EntryDescription]] = {}
    for name, value in state.items():
        if isinstance(value, EntryDescription):
            descriptions.setdefault(name.removesuffix(value.name), {})[value.name] = value
    tables = []
    for start, entries in descriptions.items():
        found = {
            name.removeprefix(prefix + start): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix + start)
        }
        if found or strict:
            tables.append(_table(start, entries, found, prefix))
    return tables


def _table(start: str, entries: Mapping[str, EntryDescription], found: Mapping[str, Any], prefix: str) -> _Table:
    description = next(iter(entries.values()))
    where = f"table '{description.table.name}' ({prefix}{start}* in the checkpoint)"
    if set(found) == {WEIGHT}:
        raise CheckpointError(
            f"{where}: a static table, whose rows belong to positions; load its state dict with "
            "dynamicemb.checkpoint.static.load_static"
        )
    if not found:
        raise CheckpointError(
            f"{where}: not in the checkpoint; if the model was saved as one of several objects, say so with prefix, "
            "as in prefix='model.'; strict=False leaves tables that are missing as they are"
        )
    if set(found) != set(entries):
        raise CheckpointError(
            f"{where}: the checkpoint has {sorted(found)}, the model {sorted(entries)}; "
            "give the table the optimizer that it was saved with"
        )
    for name, entry in found.items():
        if not isinstance(entry, TensorStorageMetadata) or not entry.size:
            raise CheckpointError(f"{where}: entry '{name}' is no tensor; the checkpoint is a foreign or damaged one")
    rows = found[KEYS].size[0]
    numbers = dict(found)
    for row_entry in row_entries(description.table.layout):
        entry = numbers.pop(row_entry.name)
        if tuple(entry.size) != (rows, *row_entry.row_shape) or entry.properties.dtype != row_entry.dtype:
            raise CheckpointError(
                f"{where}: entry '{row_entry.name}' is {entry.properties.dtype} {list(entry.size)}, the model needs "
                f"{row_entry.dtype} {[rows, *row_entry.row_shape]}; give the table the dim, dtype and optimizer that "
                "it was saved with"
            )
    return _Table(
        start, description, rows, {name: (entry.size[0], entry.properties.dtype) for name, entry in numbers.items()}
    )


# ---------------------------------------------------------------------------------------------------- owners


def _counts_by_owner(
    tables: list[_Table], prefix: str, reader: StorageReader, process_group: Optional[dist.ProcessGroup]
) -> dict[str, list[int]]:
    """Rows of each table that belong to each rank, by the table's start. Keys are read, each by one rank.

    Rows are in the order of the mixed key, so the owner's ranges follow from their sizes.
    """
    names = {table.start: prefix + table.start + KEYS for table in tables}
    keys, asked = {}, {}
    for table in tables:
        ranks = Ranks(table.process_group)
        edges = [table.rows * rank // ranks.size for rank in range(ranks.size + 1)]
        counts = [stop - first for first, stop in itertools.pairwise(edges)]
        keys[table.start] = torch.empty(counts[ranks.rank], dtype=torch.int64)
        asked[names[table.start]] = sharded_rows(keys[table.start], counts, table.process_group)
    if asked:
        dcp.load(asked, storage_reader=reader, process_group=process_group)
    result = {}
    for table in tables:
        ranks = Ranks(table.process_group)
        own = torch.bincount(owners(keys[table.start], ranks.size), minlength=ranks.size)
        result[table.start] = [sum(column) for column in zip(*ranks.gather(own.tolist()), strict=True)]
    return result
