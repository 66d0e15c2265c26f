"""The tables of a checkpoint on the terminal, one line for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import StoredTable
from dynamicemb.cli.console import count, show, size, table, text

__all__ = ["fullness", "show_collection"]

#: Columns that a name gets before it is broken over lines; columns that leave less are left out.
_NAME_COLUMNS = 24


@dataclass(frozen=True)
class _Column:
    """What is said of each table.

    Attributes:
        heading: of the column.
        cell: what to say of one table.
        common: how to say once what is the same for all; None for what is said of each in any case.
    """

    heading: str
    cell: Callable[[TableRecord], str]
    common: Optional[str] = None


_ROWS = (
    _Column("rows", lambda record: count(record.rows)),
    _Column("size", lambda record: size(record.num_bytes)),
    _Column("full", lambda record: fullness(record) or "-"),
)
_CHANGES = (
    _Column("changed", lambda record: count(record.rows)),
    _Column("gone", lambda record: count(record.evicted_rows)),
    _Column("table rows", lambda record: count(record.table_rows)),
    _Column("size", lambda record: size(record.num_bytes)),
    _Column("since clock", lambda record: count(record.since or 0), "since clock {}"),
)
#: In the order of importance: on a narrow terminal the last ones are left out first.
_FACTS = (
    _Column("dim", lambda record: str(record.schema.dim), "dim {}"),
    _Column("optimizer", lambda record: record.optimizer.kind, "{}"),
    _Column("dtype", lambda record: record.schema.dtype, "{}"),
    _Column("evicted", lambda record: count(record.counters.evicted), "{} evicted"),
    _Column("refused", lambda record: count(record.counters.refused), "{} refused"),
    _Column("eviction", lambda record: record.evict_strategy, "eviction by {}"),
    _Column("clock", lambda record: count(record.clock), "clock {}"),
)


def fullness(record: TableRecord) -> str:
    """Such as ``18.3%``: rows of the table by slots at full size; empty if no training job wrote it."""
    placement = record.placement
    capacity = 0 if placement is None else placement.world_size * placement.max_slots
    return f"{record.table_rows / capacity:.1%}" if capacity else ""


def show_collection(console: Console, collection: str, tables: Sequence[StoredTable]) -> None:
    """One line for each table, with as many columns as fit; what all of them have in common is said once."""
    records = [stored.record for stored in tables]
    columns = (*(_ROWS if records[0].since is None else _CHANGES), *_FACTS)
    said = {column.heading: {column.cell(record) for record in records} for column in columns}
    shared = [column for column in columns if column.common and len(said[column.heading]) == 1 and len(tables) > 1]
    own = [column for column in columns if column not in shared]
    while len(own) > 1 and _columns(own, tables, _NAME_COLUMNS) > console.width - 1:
        del own[-1]
    console.print(f"  [bold]{text(collection)}[/bold]", soft_wrap=True)
    if shared:
        common = ", ".join(str(column.common).format(*said[column.heading]) for column in shared)
        console.print(Padding(f"all tables: {common}", (0, 0, 0, 2)))
    show(console, _lines(own, tables))


def _lines(columns: Sequence[_Column], tables: Sequence[StoredTable]) -> Table:
    shown = table("<table", *(column.heading for column in columns))
    for stored in tables:
        shown.add_row(text(stored.table), *(column.cell(stored.record) for column in columns))
    return shown


def _columns(columns: Sequence[_Column], tables: Sequence[StoredTable], name_columns: int) -> int:
    """How many columns of a terminal the lines take, with names broken where they are longer than ``name_columns``."""
    longest = max(len("table"), *(len(stored.table) for stored in tables))
    widths = [max(len(column.heading), *(len(column.cell(s.record)) for s in tables)) for column in columns]
    return sum(widths) + min(longest, name_columns) + 3 * len(widths) + 3
