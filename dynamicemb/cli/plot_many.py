"""Many tables in one picture: each is a column, so that the odd ones stand out; ``--table`` shows those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynamicemb.cli.plot_histogram import INK, NORM_COLOUR, SCORE_COLOUR, shortened

if TYPE_CHECKING:
    from dynamicemb.checkpoint.files.reader import StoredTable
    from dynamicemb.checkpoint.inspection.summary import Histogram, TableSummary

__all__ = ["draw_many"]

Summaries = Sequence[tuple["StoredTable", "TableSummary"]]

_INCHES = (14.0, 9.0)
#: Names that have room side by side, turned by a right angle, and characters of each.
_NAMES, _NAME_COLUMNS = 110, 28
#: Parts from the lowest to the highest score of a table.
_SCORE_PARTS = 16


def draw_many(shown: Summaries) -> Any:
    """A picture of tables that have rows, left to right: how many rows, where their scores lie, and their norms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    rows, scores, norms = figure.subplots(3, 1, sharex=True)
    _draw_rows(rows, shown)
    _draw_scores(scores, shown)
    _draw_norms(norms, shown)
    for axis in (rows, scores, norms):
        axis.tick_params(colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    step = -(-len(shown) // _NAMES)
    named = range(0, len(shown), step)
    norms.set_xticks(
        named, [shortened(shown[place][0].table, _NAME_COLUMNS) for place in named], rotation=90, fontsize=7
    )
    norms.set_xlim(-0.6, len(shown) - 0.4)
    if step > 1:
        norms.set_xlabel(f"{len(shown):,} tables; one in {step} is named", color=INK)
    return figure


def _draw_rows(axis: Any, shown: Summaries) -> None:
    places = range(len(shown))
    placements = [table.record.placement for table, _ in shown]
    slots = [0 if spread is None else spread.world_size * spread.max_slots for spread in placements]
    axis.bar(places, slots, color="#dddddd", label="slots at full size")
    axis.bar(places, [table.rows for table, _ in shown], color=INK, alpha=0.75, label="rows")
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    axis.set_ylabel("rows", color=INK)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False, labelcolor=INK)


def _draw_scores(axis: Any, shown: Summaries) -> None:
    """Darker where more of a table's rows are; the scale is each table's own."""
    from matplotlib.colors import LinearSegmentedColormap

    columns = [_spread(summary.scores.histogram) for _, summary in shown if summary.scores is not None]
    edges = [part / _SCORE_PARTS for part in range(_SCORE_PARTS + 1)]
    colours = LinearSegmentedColormap.from_list("scores", ["#ffffff", SCORE_COLOUR, "#16304f"])
    axis.pcolormesh([place - 0.5 for place in range(len(shown) + 1)], edges, list(zip(*columns)), cmap=colours)
    axis.set_yticks([0, 1], ["lowest", "highest"])
    axis.set_ylabel("score of a table's rows", color=INK)


def _spread(histogram: Histogram) -> list[float]:
    """Shares of the fullest bin, one for each part of the way from the lowest to the highest score."""
    most, bins = max(histogram.counts), len(histogram.counts)
    return [histogram.counts[part * bins // _SCORE_PARTS] / most for part in range(_SCORE_PARTS)]


def _draw_norms(axis: Any, shown: Summaries) -> None:
    norms = [summary.norms for _, summary in shown]
    finite = [(place, norm) for place, norm in enumerate(norms) if norm is not None and norm.median is not None]
    places = [place for place, _ in finite]
    axis.vlines(
        places,
        [norm.smallest for _, norm in finite],
        [norm.largest for _, norm in finite],
        color=NORM_COLOUR,
        alpha=0.5,
    )
    axis.plot(places, [norm.median for _, norm in finite], "o", ms=3, color=NORM_COLOUR, label="median")
    odd = [place for place, norm in enumerate(norms) if norm is not None and norm.non_finite]
    if odd:
        axis.plot(odd, [0] * len(odd), "x", color="red", label="some are not finite")
    medians = [norm.median for _, norm in finite if norm.median]
    if medians and max(norm.largest or 0 for _, norm in finite) > 100 * max(medians):
        axis.set_yscale("symlog", linthresh=min(medians))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("norm of a row: from, median, to", color=INK)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False, labelcolor=INK)
