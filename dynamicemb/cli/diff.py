"""``dynamicemb diff``: what differs between two checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamicemb.cli.arguments import Json

if TYPE_CHECKING:
    from rich.console import Console

    from dynamicemb.checkpoint.inspection.compare import Comparison, KeyRun, TableComparison

__all__ = ["diff"]

#: Keys of each kind in a table; ``--json`` has a few more.
_SHOWN_KEYS = 3


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a checkpoint.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare two checkpoints: keys that only one has, rows that differ and by how much, settings that differ.

    Ends with exit code 1 if anything differs. How many ranks wrote them makes no difference. Rows are the same if they
    are the same bit for bit. Reads every byte once, in bounded memory, and checks it.

    [bold]Example:[/bold] dynamicemb diff /data/step-1000 /data/step-2000
    """
    from dynamicemb.checkpoint.files.reader import Checkpoint
    from dynamicemb.checkpoint.inspection.compare import compare
    from dynamicemb.cli.console import print_json, progress

    with Checkpoint(a) as first, Checkpoint(b) as second, progress("comparing") as move:
        comparison = compare(first, second, move)
    if json:
        print_json(_document(a, b, comparison))
    else:
        _show(comparison)
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


def _show(comparison: Comparison) -> None:
    from dynamicemb.cli.console import screen, text

    console = screen()
    if comparison.kinds[0] != comparison.kinds[1]:
        console.print(f"A is a {comparison.kinds[0]} checkpoint, B a {comparison.kinds[1]} one")
    for name, tables in (("A", comparison.only_a), ("B", comparison.only_b)):
        for collection, table in tables:
            console.print(f"[bold]{text(table)}[/bold] in {text(collection)}: only in {name}", soft_wrap=True)
    for compared in comparison.tables:
        _show_table(console, compared)
    if comparison.equal:
        console.print("[green]the same[/green]")


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
