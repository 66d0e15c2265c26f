"""One table of ``dynamicemb inspect`` on the terminal, with all that is known of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Union

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.reader import StoredTable
from dynamicemb.checkpoint.inspection.summary import Histogram, NormSummary, RankedRow, ScoreSummary, TableSummary
from dynamicemb.cli.console import BAR_COLUMNS, bar, count, fields, number, show, size, table, text
from dynamicemb.cli.overview import fullness

__all__ = ["show_table"]

#: Hyperparameters that an optimizer has no use for, whatever the manifest says.
_UNUSED = {"sgd": ("beta1", "beta2", "eps"), "adagrad": ("beta1", "beta2"), "rowwise_adagrad": ("beta1", "beta2")}
#: Columns of a histogram's labels from which on they are rounded.
_LABEL_COLUMNS = 34
#: Columns that a title has at least before it is broken.
_TITLE_COLUMNS = 34
#: Columns between two tables side by side.
_GAP_COLUMNS = 2


@dataclass(frozen=True)
class _Titled:
    """Something to show, and what is said above it."""

    title: str
    shown: Union[Table, Text]


def show_table(console: Console, stored: StoredTable, summary: TableSummary) -> None:
    console.rule(f"[bold]{text(stored.table)}[/bold] in {text(stored.collection)}", align="left", style="dim")
    console.print(fields(list(_facts(stored.record))))
    console.print()
    if summary.scores is None or summary.norms is None:
        console.print("  no rows\n")
        return
    bars = (BAR_COLUMNS, BAR_COLUMNS // 2)
    _show_pair(console, [(_scores(summary.scores, columns), _norms(summary.norms, columns)) for columns in bars])
    if summary.scores.top:
        highest, lowest = _ranked(summary.scores.top), _ranked(summary.scores.bottom)
        _show_pair(console, [(_Titled("highest scores", highest), _Titled("lowest scores", lowest))])


def _show_pair(console: Console, variants: Sequence[tuple[_Titled, _Titled]]) -> None:
    """Side by side in the first variant that the terminal is wide enough for, else the first, one below the other.

    Titles are broken where that is what it takes.
    """
    for pair in variants:
        widths = [max(_TITLE_COLUMNS, console.measure(half.shown).maximum + 1) for half in pair]
        room = console.width - sum(widths) - _GAP_COLUMNS
        if room >= 0:
            both = Table.grid(padding=(0, _GAP_COLUMNS, 0, 0))
            for half, width in zip(pair, widths):
                more = min(room, max(0, len(half.title) + 2 - width))
                room -= more
                both.add_column(width=width + more)
            both.add_row(*(Padding(f"[bold]{half.title}[/bold]", (0, 0, 0, 2)) for half in pair))
            both.add_row(*(Padding(half.shown, (0, 0, 1, 1)) for half in pair))
            console.print(both)
            return
    for half in variants[0]:
        show(console, half.shown, half.title)


def _facts(record: TableRecord) -> Iterator[tuple[str, str]]:
    yield "rows", f"{count(record.rows)} of dim {record.schema.dim}, {record.schema.dtype}, {size(record.num_bytes)}"
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
    ranks = f"{count(placement.world_size)} rank{'s' * (placement.world_size != 1)}"
    share = f", {fullness(record)} full" if fullness(record) else ""
    return f"{ranks} with {count(placement.max_slots)} slots each at full size{share}"


def _scores(scores: ScoreSummary, bar_columns: int) -> _Titled:
    span = f"{count(scores.smallest)} to {count(scores.largest)}, mean {scores.mean:,.6g}"
    return _Titled(f"scores: {span}", _histogram(scores.histogram, _score_labels(scores.histogram), bar_columns))


def _score_labels(histogram: Histogram) -> list[str]:
    """Scores are whole numbers: a bin ends just below where the next begins."""
    starts, last = histogram.edges[:-1], histogram.edges[-1]
    ends = [*(edge - 1 for edge in starts[1:]), last]
    labels = [count(int(a)) if a == b else f"{count(int(a))} to {count(int(b))}" for a, b in zip(starts, ends)]
    if max(map(len, labels)) > _LABEL_COLUMNS:
        labels = [f"{a:.4g} to {b:.4g}" for a, b in zip(starts, ends)]
    return labels


def _norms(norms: NormSummary, bar_columns: int) -> _Titled:
    span = "none is finite"
    if norms.smallest is not None:
        span = f"{number(norms.smallest)} to {number(norms.largest)}, median {number(norms.median)}"
    odd = [
        f"{count(rows)} {what}" for rows, what in ((norms.zero, "all zeros"), (norms.non_finite, "not finite")) if rows
    ]
    title = "; ".join([f"norms of rows: {span}", *odd])
    if norms.histogram is None:
        return _Titled(title, Text())
    return _Titled(title, _histogram(norms.histogram, _norm_labels(norms.histogram), bar_columns))


def _norm_labels(histogram: Histogram) -> list[str]:
    edges = histogram.edges
    for digits in range(3, 17):  # as many as it takes to tell the edges apart
        shown = [f"{edge:#.{digits}g}".rstrip(".") for edge in edges]
        if len(set(shown)) == len(set(edges)):
            break
    return [a if a == b else f"{a} to {b}" for a, b in itertools.pairwise(shown)]


def _histogram(histogram: Histogram, labels: list[str], bar_columns: int) -> Table:
    shown = table("from, to (by factors)" if histogram.logarithmic else "from, to", "rows", "|")
    most = max(histogram.counts)
    for label, rows in zip(labels, histogram.counts):
        shown.add_row(label, count(rows), f"[cyan]{bar(rows / most, bar_columns)}[/cyan]")
    return shown


def _ranked(rows: tuple[RankedRow, ...]) -> Table:
    shown = table("score", "key", "norm", "row")
    for row in rows:
        shown.add_row(count(row.score), str(row.key), number(row.norm), count(row.row))
    return shown
