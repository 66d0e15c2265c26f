"""``dynamicemb inspect``: what is in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dynamicemb.cli.arguments import CheckpointPath, Json, TableChoice, chosen_tables, parsed_path

if TYPE_CHECKING:
    from dynamicemb.checkpoint.files.reader import Checkpoint, StoredTable
    from dynamicemb.checkpoint.inspection.summary import TableSummary

__all__ = ["inspect"]

Summaries = list[tuple["StoredTable", "TableSummary"]]


def inspect(
    path: CheckpointPath,
    tables: TableChoice = None,
    top: Annotated[
        int, typer.Option(min=0, help="Rows with the highest and with the lowest scores of a table shown in full.")
    ] = 5,
    plot: Annotated[
        Optional[Path],
        typer.Option(
            parser=parsed_path,
            metavar="FILE.png",
            show_default=False,
            help="Also draw the histograms (needs matplotlib).",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what is in a checkpoint: one line for each table, or all of one table with [bold]--table[/bold].

    All of a table: its optimizer, histograms of scores and of norms, and the rows at both ends of the scores. That, and
    --plot and --json, read every score and every row once, in bounded memory; the lines come from the manifest alone. A
    checkpoint of one table is shown in full. Checks sizes only; [bold]verify[/bold] checks the rest.

    [bold]Example:[/bold] dynamicemb inspect /data/checkpoint --table item --plot item.png
    """
    from dynamicemb.checkpoint.files.reader import Checkpoint
    from dynamicemb.checkpoint.inspection.summary import summarize
    from dynamicemb.cli.console import print_json, progress

    if plot is not None:
        from dynamicemb.cli.plot import check_plot, draw

        check_plot(plot)
    with Checkpoint(path) as checkpoint:
        chosen = [checkpoint.tables[name] for name in chosen_tables(checkpoint.tables, tables, str(path))]
        in_full = bool(tables) or len(chosen) == 1
        summaries: Summaries = []
        if json or in_full or plot is not None:
            with progress("inspecting") as move:
                summaries = [(table, summarize(table, top, move)) for table in chosen]
        if plot is not None:  # before anything is printed: who reads that may stop when they have seen enough
            draw(summaries, plot)
        if json:
            print_json(_document(checkpoint, summaries))
        else:
            _show(checkpoint, chosen, summaries if in_full else [])


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
        "digest": record.digest(table.table),
        "follows": None if record.follows is None else [dataclasses.asdict(one) for one in record.follows],
        "placement": None if record.placement is None else dataclasses.asdict(record.placement),
        "scores": None if summary.scores is None else dataclasses.asdict(summary.scores),
        "norms": None if summary.norms is None else dataclasses.asdict(summary.norms),
    }


def _show(checkpoint: Checkpoint, chosen: Sequence[StoredTable], in_full: Summaries) -> None:
    from dynamicemb.cli.console import count, screen, size, text
    from dynamicemb.cli.overview import show_collection
    from dynamicemb.cli.summary import show_table

    console = screen()
    manifest = checkpoint.manifest
    rows, num_bytes = sum(table.rows for table in chosen), sum(table.record.num_bytes for table in chosen)
    console.print(f"[bold]{text(str(checkpoint.path))}[/bold]", soft_wrap=True)
    console.print(
        f"{manifest.kind} checkpoint, {count(len(chosen))} table{'s' * (len(chosen) != 1)}, {count(rows)} rows, "
        f"{size(num_bytes)}, written by dynamicemb {text(manifest.package_version)}"
    )
    console.print()
    if len(chosen) > 1:
        for collection in dict.fromkeys(table.collection for table in chosen):
            show_collection(console, collection, [table for table in chosen if table.collection == collection])
    for table, summary in in_full:
        show_table(console, table, summary)
    if len(chosen) > 1 and not in_full:
        console.print("[bold]--table NAME[/bold] shows one of them in full: histograms of scores and norms, and rows")
