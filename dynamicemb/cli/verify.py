"""``dynamicemb verify``: whether a checkpoint is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from dynamicemb.cli.arguments import CheckpointPath, Json

if TYPE_CHECKING:
    from dynamicemb.checkpoint.inspection.verify import Verification

__all__ = ["verify"]


def verify(path: CheckpointPath, json: Json = False) -> None:
    """Check everything: sizes, checksums, order, duplicate keys, sums, and the rows that each rank owns.

    Lists all that is wrong, and then ends with exit code 1. Reads every byte once, in bounded memory.

    [bold]Example:[/bold] dynamicemb verify /data/checkpoint && rm -r /data/checkpoint.old
    """
    from dynamicemb.checkpoint.inspection.verify import verify as check
    from dynamicemb.cli.console import print_json, progress

    with progress("verifying", "bytes") as move:
        found = check(path, move)
    if json:
        print_json(_document(found))
    else:
        _show(found)
    if found.findings:
        raise typer.Exit(1)


def _document(found: Verification) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "ok": not found.findings,
        "kind": found.kind,
        "tables": found.tables,
        "rows": found.rows,
        "files": found.files,
        "bytes": found.num_bytes,
        "problems": [
            {"file": finding.file, "offset": finding.offset, "message": finding.message} for finding in found.findings
        ],
        "notes": list(found.notes),
    }


def _show(found: Verification) -> None:
    from dynamicemb.cli.console import count, screen, size, text

    console = screen()
    for finding in found.findings:
        place = finding.file if finding.offset is None else f"{finding.file}, offset {finding.offset}"
        console.print(f"[red]{text(place)}[/red]: {text(finding.message)}", soft_wrap=True)
    for note in found.notes:
        console.print(f"[yellow]note[/yellow]: {text(note)}", soft_wrap=True)
    if found.kind is None:
        verdict = "[bold red]not a whole checkpoint[/bold red]"
    elif found.findings:
        number = len(found.findings)
        verdict = (
            f"[bold red]{count(number)} problem{'s' * (number != 1)}[/bold red] in {size(found.num_bytes)}: "
            "restore the files from a copy, or use an earlier checkpoint"
        )
    else:
        tables = f"{count(found.tables)} table{'s' * (found.tables != 1)}"
        verdict = (
            f"[bold green]ok[/bold green], {found.kind} checkpoint: {tables}, {count(found.rows)} rows, "
            f"{count(found.files)} files, {size(found.num_bytes)}"
        )
    console.print(f"{text(str(found.path))}: {verdict}", soft_wrap=True)
