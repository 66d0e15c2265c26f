"""``dynamicemb inspect``: what is in a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dynamicemb.cli.arguments import CheckpointPath, Json

if TYPE_CHECKING:
    from dynamicemb.checkpoint.files.reader import Checkpoint, StoredTable
    from dynamicemb.checkpoint.inspection.summary import TableSummary

__all__ = ["inspect"]

Summaries = list[tuple["StoredTable", "TableSummary"]]


def inspect(
    path: CheckpointPath,
    tables: Annotated[
        Optional[list[str]],
        typer.Option(
            "--table", metavar="NAME", show_default=False, help="Only this table; may be repeated. Default: all."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Rows to show with the highest and with the lowest scores.")] = 5,
    plot: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE.png", show_default=False, help="Also draw the histograms (needs matplotlib)."),
    ] = None,
    json: Json = False,
) -> None:
    """Show tables, rows, sizes, optimizers, histograms of scores and norms, and the rows at both ends of the scores.

    Reads every score and every row once, in bounded memory. Checks sizes only; [bold]verify[/bold] checks the rest.

    [bold]Example:[/bold] dynamicemb inspect /data/checkpoint --table item --plot item.png
    """
    from dynamicemb.checkpoint.files.reader import Checkpoint
    from dynamicemb.checkpoint.inspection.summary import summarize
    from dynamicemb.cli.console import print_json, progress

    if plot is not None:
        from dynamicemb.cli.plot import check_plot, draw

        check_plot(plot)
    with Checkpoint(path) as checkpoint:
        chosen = [checkpoint.table(name) for name in tables] if tables else list(checkpoint.tables.values())
        with progress("inspecting") as move:
            summaries = [(table, summarize(table, top, move)) for table in chosen]
        if plot is not None:  # before anything is printed: who reads that may stop when they have seen enough
            draw(summaries, plot)
        if json:
            print_json(_document(checkpoint, summaries))
        else:
            _show(checkpoint, summaries)


def _document(checkpoint: Checkpoint, summaries: Summaries) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.manifest.kind,
        "package_version": checkpoint.manifest.package_version,
        "rows": sum(table.rows for table, _ in summaries),
        "bytes": sum(table.record.num_bytes for table, _ in summaries),
        "tables": [_table_document(table, summary) for table, summary in summaries],
    }


def _table_document(table: StoredTable, summary: TableSummary) -> dict[str, Any]:
    record = table.record
    return {
        "collection": table.collection,
        "table": table.table,
        "rows": record.rows,
        "table_rows": record.table_rows,
        "evicted_rows": record.evicted_rows,
        "since": record.since,
        "dim": record.schema.dim,
        "dtype": record.schema.dtype,
        "bytes": record.num_bytes,
        "parts": {
            part.name: {"dtype": part.dtype, "shape": part.shape(entry.rows), "bytes": entry.rows * part.row_bytes}
            for part, entry in record.files
        },
        "optimizer": dataclasses.asdict(record.optimizer),
        "evict_strategy": record.evict_strategy,
        "clock": record.clock,
        "custom_score": record.custom_score,
        "counters": dataclasses.asdict(record.counters),
        "seed": record.seed,
        "initializer": dict(record.initializer),
        "bucket_capacity": record.bucket_capacity,
        "placement": None if record.placement is None else dataclasses.asdict(record.placement),
        "scores": None if summary.scores is None else dataclasses.asdict(summary.scores),
        "norms": None if summary.norms is None else dataclasses.asdict(summary.norms),
    }


def _show(checkpoint: Checkpoint, summaries: Summaries) -> None:
    from dynamicemb.cli.console import count, screen, size, text
    from dynamicemb.cli.summary import show_collection, show_table

    console = screen()
    rows, num_bytes = (sum(table.rows for table, _ in summaries), sum(t.record.num_bytes for t, _ in summaries))
    manifest = checkpoint.manifest
    console.print(f"[bold]{text(str(checkpoint.path))}[/bold]", soft_wrap=True)
    console.print(
        f"{manifest.kind} checkpoint, {count(len(summaries))} table{'s' * (len(summaries) != 1)}, {count(rows)} rows, "
        f"{size(num_bytes)}, written by dynamicemb {text(manifest.package_version)}"
    )
    console.print()
    for collection in dict.fromkeys(stored.collection for stored, _ in summaries):
        show_collection(console, collection, [stored for stored, _ in summaries if stored.collection == collection])
    for stored, summary in summaries:
        show_table(console, stored, summary)
