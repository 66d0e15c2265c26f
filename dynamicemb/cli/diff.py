"""``dynamicemb diff``: what differs between two checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamicemb.cli.arguments import Json, TableChoice, chosen_tables, parsed_path
from dynamicemb.names import listed, natural_order

if TYPE_CHECKING:
    from rich.console import Console

    from dynamicemb.checkpoint.inspection.compare import Comparison, KeyRun, TableComparison

__all__ = ["diff"]

#: Names of tables that only one checkpoint has; ``--json`` has all of them.
_SHOWN_TABLES = 40
#: Keys of each kind in a table; ``--json`` has a few more.
_SHOWN_KEYS = 3


def diff(
    a: Annotated[
        Path, typer.Argument(parser=parsed_path, metavar="A", help="Folder of a checkpoint.", show_default=False)
    ],
    b: Annotated[
        Path, typer.Argument(parser=parsed_path, metavar="B", help="Folder of another one.", show_default=False)
    ],
    tables: TableChoice = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints: keys that only one has, rows that differ and by how much, settings that differ.

    One line for each table that differs; which keys, by how much and which settings with [bold]--table[/bold], which
    compares that table alone, or if there is only one.

    Ends with exit code 1 if anything differs. How many ranks wrote them makes no difference. Rows are the same if they
    are the same bit for bit. Reads every byte once, in bounded memory, and checks it.

    [bold]Example:[/bold] dynamicemb diff /data/step-1000 /data/step-2000
    """
    from dynamicemb.checkpoint.files.reader import Checkpoint
    from dynamicemb.checkpoint.inspection.compare import compare
    from dynamicemb.cli.console import print_json, progress

    with Checkpoint(a) as first, Checkpoint(b) as second, progress("comparing") as move:
        every = sorted({**first.tables, **second.tables}, key=lambda table: natural_order("/".join(table)))
        comparison = compare(first, second, move, chosen_tables(every, tables, f"{a} and {b}"))
    if json:
        print_json(_document(a, b, comparison))
    else:
        _show(comparison, in_full=bool(tables) or len(comparison.tables) == 1)
    if not comparison.equal:
        raise typer.Exit(1)


def _document(a: Path, b: Path, comparison: Comparison) -> dict[str, Any]:
    return {
        "a": str(a),
        "b": str(b),
        "equal": comparison.equal,
        "kind": {"a": comparison.kinds[0], "b": comparison.kinds[1]},
        "only_a": [f"{collection}/{table}" for collection, table in comparison.only_a],
        "only_b": [f"{collection}/{table}" for collection, table in comparison.only_b],
        "tables": [{"equal": table.equal, **dataclasses.asdict(table)} for table in comparison.tables],
    }


def _show(comparison: Comparison, in_full: bool) -> None:
    from dynamicemb.cli.console import screen, text

    console = screen()
    if comparison.kinds[0] != comparison.kinds[1]:
        console.print(f"A is a {comparison.kinds[0]} checkpoint, B a {comparison.kinds[1]} one")
    for name, tables in (("A", comparison.only_a), ("B", comparison.only_b)):
        for collection in dict.fromkeys(collection for collection, _ in tables):
            own = [table for owner, table in tables if owner == collection]
            number = f"{len(own):,} table{'s' * (len(own) != 1)} of {text(collection)}"
            console.print(f"{number}: [red]only in {name}[/red]: {text(listed(own, _SHOWN_TABLES))}")
    if in_full:
        for compared in comparison.tables:
            _show_table(console, compared)
    else:
        _show_lines(console, comparison.tables)
    if comparison.equal:
        console.print("[green]the same[/green]")


def _show_lines(console: Console, tables: list[TableComparison]) -> None:
    """One line for each table that differs, one for all that do not."""
    from dynamicemb.cli.console import count, show, table, text

    differing = [compared for compared in tables if not compared.equal]
    if same := len(tables) - len(differing):
        rows = sum(compared.common for compared in tables if compared.equal)
        console.print(f"{count(same)} table{'s' * (same != 1)}: [green]the same[/green], {count(rows)} rows")
    for collection in dict.fromkeys(compared.collection for compared in differing):
        shown = table("<table", "in both", "rows differ", "only in A", "only in B", "settings")
        for compared in differing:
            if compared.collection == collection:
                runs = (compared.only_a, compared.evicted_only_a), (compared.only_b, compared.evicted_only_b)
                only = (count(sum(run.count for run in both)) for both in runs)
                numbers = (count(compared.common), count(compared.changed.count), *only, str(len(compared.settings)))
                shown.add_row(text(compared.table), *numbers)
        console.print()
        show(console, shown, f"{text(collection)}: [red]differs[/red]")
    if differing:
        console.print("[bold]--table NAME[/bold] shows one of them in full: keys, by how much, settings")


def _show_table(console: Console, compared: TableComparison) -> None:
    from dynamicemb.cli.console import count, show, table, text

    title = f"[bold]{text(compared.table)}[/bold] in {text(compared.collection)}"
    if compared.equal:
        console.print(f"{title}: [green]the same[/green], {count(compared.common)} rows", soft_wrap=True)
        return
    console.print(f"{title}: [red]differs[/red]", soft_wrap=True)
    keys = table("<", "keys", "<such as")
    keys.add_row("in both", count(compared.common))
    _add_run(keys, "in both, rows differ", compared.changed)
    _add_run(keys, "only in A", compared.only_a)
    _add_run(keys, "only in B", compared.only_b)
    _add_run(keys, "gone only in A", compared.evicted_only_a)
    _add_run(keys, "gone only in B", compared.evicted_only_b)
    show(console, keys)
    _show_parts(console, compared)
    if compared.settings:
        settings = table("<setting", "<A", "<B")
        for setting in compared.settings:
            settings.add_row(text(setting.name), text(_said(setting.a)), text(_said(setting.b)))
        show(console, settings)


def _add_run(keys: Any, name: str, run: KeyRun) -> None:
    from dynamicemb.cli.console import count

    if run.count:
        more = ["..."] if run.count > _SHOWN_KEYS else []
        keys.add_row(name, count(run.count), ", ".join([*map(str, run.examples[:_SHOWN_KEYS]), *more]))


def _said(value: Any) -> str:
    return "-" if value is None else str(value)


def _show_parts(console: Console, compared: TableComparison) -> None:
    from dynamicemb.cli.console import count, number, show, table, text

    differing = {name: part for name, part in compared.parts.items() if part.rows}
    if not differing:
        return
    shown = table("<part", "rows that differ", "largest difference", "at key")
    for name, part in differing.items():
        largest, key = ("-", "-") if part.key is None else (number(part.max_difference), str(part.key))
        shown.add_row(text(name), count(part.rows), largest, key)
    show(console, shown)
    for name, part in differing.items():
        if part.non_finite:
            console.print(f"{text(name)}: {count(part.non_finite)} differing numbers are infinite or NaN")
