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
from contextlib import ExitStack
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, StorageReader

from dynamicemb.checkpoint.dcp_tables import SavedRows, refuse_dynamic_for_static, saved_rows
from dynamicemb.checkpoint.files.paths import local_path
from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.errors import CheckpointError
from dynamicemb.kernels.hashing import owners
from dynamicemb.shard.collective import collective
from dynamicemb.shard.sharded_rows import sharded_rows
from dynamicemb.shard.state_dict import CONFIG_ENTRY, KEYS, EntryDescription
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
        strict: False leaves alone what the checkpoint does not have, whole dynamic tables included; where it has keys
            and rows of a table, but not all that belongs to them, that starts fresh, with a warning.
        storage_reader: in place of files in the folder ``checkpoint_id``.
        process_group: ranks that load; None: all.

    Raises:
        CheckpointError: a table is missing, is a static one in the checkpoint but dynamic in the model or the other way
            round, or has another dim, dtype, eviction strategy or optimizer; or its rows are not what they should be.
            No dynamic table has changed.
        RemoteRankError: that happened on another rank.
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    reader = _reader(checkpoint_id, storage_reader)
    with collective("dynamicemb.checkpoint.dcp.load()", process_group or _all_ranks()):
        state = _sized_state_dict(model, reader, prefix, strict, process_group)
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
    with collective("sized_state_dict()", process_group or _all_ranks()):
        return _sized_state_dict(model, reader, prefix, strict, process_group)


def _sized_state_dict(
    model: nn.Module, reader: StorageReader, prefix: str, strict: bool, process_group: Optional[dist.ProcessGroup]
) -> dict[str, Any]:
    state = _described_state_dict(model)
    ranks = Ranks(process_group or _all_ranks())
    tables: list[SavedRows] = []
    known: set[str] = set()

    def read_metadata() -> None:
        metadata = reader.read_metadata()
        known.update(metadata.state_dict_metadata)
        refuse_dynamic_for_static(state, known, prefix)
        tables.extend(saved_rows(metadata, state, prefix, strict))

    ranks.together(read_metadata)
    if not strict:
        state = {name: value for name, value in state.items() if prefix + name in known}
    configs = _configs(tables, reader, process_group)

    def check_fit_of_all() -> None:
        for table in tables:
            table.check_fit(configs[table.start], strict)

    ranks.together(check_fit_of_all)
    counts = _counts_by_owner(tables, reader, process_group)
    for table in tables:
        state |= table.empty(counts[table.start])
    return {name: value for name, value in state.items() if not isinstance(value, EntryDescription)}


def _all_ranks() -> Optional[dist.ProcessGroup]:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _reader(checkpoint_id: CheckpointId, storage_reader: Optional[StorageReader]) -> StorageReader:
    if storage_reader is None:
        if checkpoint_id is None:
            raise CheckpointError("give checkpoint_id, the folder of the checkpoint, or storage_reader")
        reader = "give storage_reader, such as torch's FsspecReader, which reads from URLs"
        return FileSystemReader(local_path(checkpoint_id, "checkpoint_id", reader))
    if checkpoint_id is not None:
        storage_reader.reset(checkpoint_id)
    return storage_reader


def _described_state_dict(model: nn.Module) -> dict[str, Any]:
    with ExitStack() as stack:
        for _, collection in dynamic_collections(model):
            stack.enter_context(collection.described_tables())
        return dict(model.state_dict())


# ---------------------------------------------------------------------------------------------------- owners


def _configs(
    tables: list[SavedRows], reader: StorageReader, process_group: Optional[dist.ProcessGroup]
) -> dict[str, Optional[torch.Tensor]]:
    """The entry ``config`` of each table, by the table's start; None: the checkpoint is of an earlier version."""
    configs: dict[str, Optional[torch.Tensor]] = {}
    for table in tables:
        saved = table.found.get(CONFIG_ENTRY)
        configs[table.start] = None if saved is None else torch.empty(saved.size, dtype=saved.properties.dtype)
    asked = {table.name(CONFIG_ENTRY): configs[table.start] for table in tables if configs[table.start] is not None}
    if asked:
        dcp.load(asked, storage_reader=reader, process_group=process_group)
    return configs


def _counts_by_owner(
    tables: list[SavedRows], reader: StorageReader, process_group: Optional[dist.ProcessGroup]
) -> dict[str, list[int]]:
    """Rows of each table that belong to each rank, by the table's start. Keys are read, each by one rank.

    Rows are in the order of the mixed key, so the owner's ranges follow from their sizes.
    """
    keys, asked = {}, {}
    for table in tables:
        ranks = Ranks(table.process_group)
        edges = [table.rows * rank // ranks.size for rank in range(ranks.size + 1)]
        counts = [stop - first for first, stop in itertools.pairwise(edges)]
        keys[table.start] = torch.empty(counts[ranks.rank], dtype=torch.int64)
        asked[table.name(KEYS)] = sharded_rows(keys[table.start], counts, table.process_group)
    if asked:
        dcp.load(asked, storage_reader=reader, process_group=process_group)
    result = {}
    for table in tables:
        ranks = Ranks(table.process_group)
        own = torch.bincount(owners(keys[table.start], ranks.size), minlength=ranks.size)
        result[table.start] = [sum(column) for column in zip(*ranks.gather(own.tolist()), strict=True)]
    return result
