"""What a ``torch.distributed.checkpoint`` has of the tables of a model, and whether they can take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dynamicemb.errors import CheckpointError
from dynamicemb.shard.checked_state import saved_table
from dynamicemb.shard.sharded_rows import sharded_rows
from dynamicemb.shard.state_dict import (
    CONFIG_ENTRY,
    KEYS,
    WEIGHT,
    EntryDescription,
    dynamic_into_static,
    entry_names,
    is_dynamic,
    row_entries,
)
from dynamicemb.table.compatibility import check_fit

__all__ = ["SavedRows", "refuse_dynamic_for_static", "saved_rows"]


@dataclass(frozen=True)
class SavedRows:
    """A table of the model and of the checkpoint.

    Attributes:
        start: what the names of its entries begin with, in the state dict of the model.
        prefix: what comes before that in the checkpoint.
        description: of one of its entries.
        found: the checkpoint's entries, by name; keys and rows are among them.
    """

    start: str
    prefix: str
    description: EntryDescription
    found: Mapping[str, TensorStorageMetadata]

    @property
    def where(self) -> str:
        return f"table '{self.description.table.name}' ({self.prefix}{self.start}* in the checkpoint)"

    @property
    def process_group(self) -> Optional[dist.ProcessGroup]:
        return self.description.process_group

    @property
    def rows(self) -> int:
        return self.found[KEYS].size[0]

    def name(self, entry: str) -> str:
        """What the checkpoint calls an entry."""
        return f"{self.prefix}{self.start}{entry}"

    def check_fit(self, config: Optional[torch.Tensor], strict: bool) -> None:
        """Raises unless the rows can be rows of the model's table; ``config`` is the checkpoint's, if it has one."""
        table = self.description.table
        widths = {name: tuple(entry.size[1:]) for name, entry in self.found.items()}
        check_fit(
            self.where,
            saved_table(self.where, table, config, widths, self.found[WEIGHT].properties.dtype),
            table.group.configs[table.index],
        )
        for entry in row_entries(table.layout):
            saved = self.found.get(entry.name)
            expected = (self.rows, *entry.row_shape)
            if saved is not None and (tuple(saved.size) != expected or saved.properties.dtype != entry.dtype):
                raise CheckpointError(
                    f"{self.where}: entry '{entry.name}' is {saved.properties.dtype} {list(saved.size)}, expected "
                    f"{entry.dtype} {list(expected)}; the checkpoint is damaged"
                )
        missing = set(entry_names(table.layout)) - set(self.found) - {CONFIG_ENTRY}
        if strict and missing:
            raise CheckpointError(
                f"{self.where}: the checkpoint has no {sorted(missing)}; strict=False loads the rows, "
                "and lets the rest start fresh"
            )

    def empty(self, counts: list[int]) -> dict[str, Any]:
        """The entries that the checkpoint has, undefined, with ``counts`` rows on each rank."""
        pg, layout = self.process_group, self.description.table.layout
        own = counts[0 if pg is None else pg.rank()]
        of_rows = {entry.name: entry for entry in row_entries(layout)}
        state: dict[str, Any] = {}
        for name in entry_names(layout):
            if name in of_rows and name in self.found:
                state[self.start + name] = sharded_rows(of_rows[name].empty(own), counts, pg)
            elif name in self.found:
                saved = self.found[name]
                state[self.start + name] = torch.empty(saved.size, dtype=saved.properties.dtype)
        return state


def refuse_dynamic_for_static(state: Mapping[str, Any], known: set[str], prefix: str) -> None:
    """Raises if the checkpoint has a dynamic table where the model has a static one."""
    for name, value in state.items():
        start = name.removesuffix(WEIGHT)
        if start != name and not isinstance(value, EntryDescription) and is_dynamic(known, prefix + start):
            table = start.removesuffix(".").rpartition(".")[2]
            raise CheckpointError(dynamic_into_static(f"table '{table}': the checkpoint ({prefix}{start}*)"))


def saved_rows(metadata: Metadata, state: Mapping[str, Any], prefix: str, strict: bool) -> list[SavedRows]:
    """What the checkpoint has of each dynamic table."""
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
            table = SavedRows(start, prefix, next(iter(entries.values())), found)  # type: ignore[arg-type]
            _check_entries(table)
            tables.append(table)
    return tables


def _check_entries(table: SavedRows) -> None:
    """Raises unless the checkpoint has the entries of a dynamic table, or some that are good for one."""
    where, found = table.where, table.found
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
    if rows := {KEYS, WEIGHT} - set(found):
        raise CheckpointError(
            f"{where}: the checkpoint has {sorted(found)}, but no {sorted(rows)}: keys and rows belong together"
        )
    for name, entry in found.items():
        if not isinstance(entry, TensorStorageMetadata) or not entry.size:
            raise CheckpointError(f"{where}: entry '{name}' is no tensor; the checkpoint is a foreign or damaged one")
