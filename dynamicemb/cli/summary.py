"""One table of ``dynamicemb inspect`` on the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.console import Console

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import StoredTable
from dynamicemb.checkpoint.inspection.summary import Histogram, NormSummary, RankedRow, ScoreSummary, TableSummary
from dynamicemb.cli.console import bar, count, fields, number, show, size, table, text

__all__ = ["show_collection", "show_table"]


#: Hyperparameters that an optimizer has no use for, whatever the manifest says.
_UNUSED = {"sgd": ("beta1", "beta2", "eps"), "adagrad": ("beta1", "beta2"), "rowwise_adagrad": ("beta1", "beta2")}
#: Columns of a histogram's labels from which on they are rounded.
_LABEL_COLUMNS = 34


def show_collection(console: Console, collection: str, tables: list[StoredTable]) -> None:
    """One line for each table."""
    shown = table("<table", "rows", "dim", "dtype", "optimizer", "size")
    for stored in tables:
        record = stored.record
        cells = (count(record.rows), str(record.schema.dim), record.schema.dtype, record.optimizer.kind)
        shown.add_row(text(stored.table), *cells, size(record.num_bytes))
    show(console, shown, text(collection))


def show_table(console: Console, stored: StoredTable, summary: TableSummary) -> None:
    console.rule(f"[bold]{text(stored.table)}[/bold] in {text(stored.collection)}", align="left", style="dim")
    console.print(fields(list(_facts(stored.record))))
    console.print()
    if summary.scores is None or summary.norms is None:
        console.print("  no rows\n")
        return
    _show_scores(console, summary.scores)
    _show_norms(console, summary.norms)
    _show_ranked(console, "highest scores", summary.scores.top)
    _show_ranked(console, "lowest scores", summary.scores.bottom)


def _facts(record: TableRecord) -> Iterator[tuple[str, str]]:
    if record.since is not None:
        changes = f"{count(record.rows)} rows, {count(record.evicted_rows)} keys gone"
        yield "changes", f"since clock {count(record.since)}: {changes}; table of {count(record.table_rows)} rows"
    parts = [f"{part.name} {size(entry.rows * part.row_bytes)}" for part, entry in record.files]
    yield "files", text(", ".join(parts))
    yield "optimizer", text(_optimizer(record))
    yield "eviction", f"{record.evict_strategy}, clock {count(record.clock)}"
    counters = record.counters
    yield (
        "counted",
        f"{count(counters.hits)} hits, {count(counters.evicted)} evicted, {count(counters.refused)} refused",
    )
    yield "written by", _placement(record)


def _optimizer(record: TableRecord) -> str:
    optimizer = record.optimizer
    unused = _UNUSED.get(optimizer.kind, ())
    numbers = [f"{name} {number(value)}" for name, value in optimizer.hyperparameters.items() if name not in unused]
    states = ", ".join(f"{name} [{width}]" for name, width in record.schema.states) or "none"
    saved = f"state {states}" if optimizer.saved else "state not saved"
    return "; ".join([", ".join([optimizer.kind, *numbers]), f"{count(optimizer.steps)} steps", saved])


def _placement(record: TableRecord) -> str:
    placement = record.placement
    if placement is None:
        return "no training job"
    capacity = placement.world_size * placement.max_slots
    ranks = f"{count(placement.world_size)} rank{'s' * (placement.world_size != 1)}"
    share = f", {record.table_rows / capacity:.1%} full" if capacity else ""
    return f"{ranks} with {count(placement.max_slots)} slots each at full size{share}"


def _show_scores(console: Console, scores: ScoreSummary) -> None:
    span = f"{count(scores.smallest)} to {count(scores.largest)}, mean {scores.mean:,.6g}"
    _show_histogram(console, f"scores: {span}", scores.histogram, _score_labels(scores.histogram))


def _score_labels(histogram: Histogram) -> list[str]:
    """Scores are whole numbers: a bin ends just below where the next begins."""
    starts, last = histogram.edges[:-1], histogram.edges[-1]
    ends = [*(edge - 1 for edge in starts[1:]), last]
    labels = [count(int(a)) if a == b else f"{count(int(a))} to {count(int(b))}" for a, b in zip(starts, ends)]
    if max(map(len, labels)) > _LABEL_COLUMNS:
        labels = [f"{a:.4g} to {b:.4g}" for a, b in zip(starts, ends)]
    return labels


def _show_norms(console: Console, norms: NormSummary) -> None:
    span = "none is finite"
    if norms.smallest is not None:
        span = f"{number(norms.smallest)} to {number(norms.largest)}, median {number(norms.median)}"
    odd = [
        f"{count(rows)} {what}" for rows, what in ((norms.zero, "all zeros"), (norms.non_finite, "not finite")) if rows
    ]
    title = "; ".join([f"norms of rows: {span}", *odd])
    if norms.histogram is None:
        console.print(f"  [bold]{title}[/bold]\n")
        return
    _show_histogram(console, title, norms.histogram, _norm_labels(norms.histogram))


def _norm_labels(histogram: Histogram) -> list[str]:
    edges = histogram.edges
    for digits in range(3, 17):  # as many as it takes to tell the edges apart
        shown = [f"{edge:#.{digits}g}".rstrip(".") for edge in edges]
        if len(set(shown)) == len(set(edges)):
            break
    return [a if a == b else f"{a} to {b}" for a, b in itertools.pairwise(shown)]


def _show_histogram(console: Console, title: str, histogram: Histogram, labels: list[str]) -> None:
    shown = table("from, to (by factors)" if histogram.logarithmic else "from, to", "rows", "|")
    most = max(histogram.counts)
    for label, rows in zip(labels, histogram.counts):
        shown.add_row(label, count(rows), f"[cyan]{bar(rows / most)}[/cyan]")
    show(console, shown, title)


def _show_ranked(console: Console, title: str, rows: tuple[RankedRow, ...]) -> None:
    if not rows:
        return
    shown = table("score", "key", "norm", "row")
    for row in rows:
        shown.add_row(count(row.score), str(row.key), number(row.norm), count(row.row))
    show(console, shown, title)
