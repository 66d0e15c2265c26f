"""What verbs that write or read a whole checkpoint say when they are done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from dynamicemb.checkpoint.files.manifest import read_manifest
from dynamicemb.checkpoint.files.staging import finished
from dynamicemb.cli.console import count, print_json, screen, size, text

if TYPE_CHECKING:
    from torch import nn

__all__ = ["dumped_tables", "loaded_tables", "show_tables", "show_written"]


def show_written(action: str, path: Path, seconds: float, json: bool, **facts: Any) -> None:
    """Says that ``path``, a folder or a file of any format, has been written; ``facts`` go into the JSON document."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    num_bytes = sum(os.path.getsize(file) for file in files)
    if json:
        numbers = {"files": len(files), "bytes": num_bytes, "seconds": seconds}
        print_json({"action": action, **facts, "path": str(path), **numbers})
        return
    number = f"{count(len(files))} file{'s' * (len(files) != 1)}"
    screen().print(f"{action} to {text(str(path))}: {number}, {size(num_bytes)}, {seconds:.1f} s", soft_wrap=True)


def dumped_tables(path: Path) -> list[dict[str, Any]]:
    """The tables of the checkpoint at ``path``: names, rows and bytes."""
    return [
        {"collection": collection, "table": table, "rows": record.rows, "bytes": record.num_bytes}
        for collection, tables in read_manifest(finished(path)).tables.items()
        for table, record in tables.items()
    ]


def loaded_tables(
    model: nn.Module, table_names: Optional[Mapping[str, list[str]]], path: Path, collections: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The tables that have been loaded: rows in the model over all ranks, and in the last checkpoint of the chain.

    All ranks call it together.
    """
    from dynamicemb.checkpoint.ranks import Ranks
    from dynamicemb.checkpoint.selection import selected_tables, stored_name

    manifest, documents = read_manifest(finished(path)), []
    stored = {(name, table): record for name, tables in manifest.tables.items() for table, record in tables.items()}
    for table in selected_tables(model, table_names):
        rows = sum(Ranks(table.process_group).gather(table.group.contents(table.index).count()))
        place = stored_name(stored, table, collections)
        assert place is not None  # it has been loaded
        in_checkpoint = stored[place].table_rows
        names = {"collection": table.collection, "table": table.name}
        documents.append({**names, "rows": rows, "left_out": in_checkpoint - rows})
    return documents


def show_tables(action: str, paths: list[Path], tables: list[dict[str, Any]], seconds: float, json: bool) -> None:
    """Says which tables have been dumped to a checkpoint, or loaded from one or from a chain."""
    rows = sum(table["rows"] for table in tables)
    if json:
        place = {"paths": [str(path) for path in paths]}
        print_json({"action": action, **place, "tables": tables, "rows": rows, "seconds": seconds})
        return
    place_names = ", ".join(str(path) for path in paths)
    number = f"{count(len(tables))} table{'s' * (len(tables) != 1)}, {count(rows)} rows"
    if left_out := sum(table.get("left_out", 0) for table in tables):
        number += f" ({count(left_out)} left out: no room)"
    screen().print(f"{action} {text(place_names)}: {number}, {seconds:.1f} s", soft_wrap=True)
