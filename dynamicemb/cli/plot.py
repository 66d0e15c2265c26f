"""``dynamicemb inspect --plot``: the histograms as a picture, two for each table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from dynamicemb.errors import ConfigError

if TYPE_CHECKING:
    from dynamicemb.checkpoint.files.reader import StoredTable
    from dynamicemb.checkpoint.inspection.summary import Histogram, TableSummary

__all__ = ["check_plot", "draw"]

_ROW_INCHES, _WIDTH_INCHES = 2.6, 10.0
#: Tables in one picture: more would be taller than image formats and viewers can take.
_MAX_TABLES = 100
_SCORE_COLOUR, _NORM_COLOUR, _INK = "#3b6fb6", "#c2702a", "#333333"


def check_plot(path: Path) -> None:
    """Raises before the long work if the picture could not be drawn.

    Raises:
        ConfigError: there is no matplotlib, no folder for the file, or no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigError("--plot needs matplotlib; pip install 'dynamicemb[plot]'") from None
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"--plot {path}: the name has to end in one of {', '.join(f'.{name}' for name in known)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first")


def draw(summaries: Sequence[tuple[StoredTable, TableSummary]], path: Path) -> None:
    """Draws scores (left) and norms (right) of every table that has rows, one table below the other.

    Raises:
        ConfigError: more tables than a picture can show.
    """
    from matplotlib.figure import Figure

    shown = [(table, summary) for table, summary in summaries if summary.scores is not None]
    if len(shown) > _MAX_TABLES:
        raise ConfigError(f"--plot: {len(shown)} tables, but a picture shows {_MAX_TABLES}; choose some with --table")
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * max(1, len(shown))), layout="constrained")
    axes = figure.subplots(max(1, len(shown)), 2, squeeze=False)
    for (left, right), (table, summary) in zip(axes, shown):
        assert summary.scores is not None and summary.norms is not None
        left.set_title(f"{table.table} in {table.collection}", loc="left", fontweight="bold", color=_INK)
        right.set_title(f"{table.rows:,} rows", loc="right", color=_INK)
        meaning = {"lru": "clock of the last lookup", "lfu": "occurrences", "customized": "customized score"}
        _draw(left, summary.scores.histogram, meaning[table.record.evict_strategy], _SCORE_COLOUR)
        left.set_ylabel("rows", color=_INK)
        _draw(right, summary.norms.histogram, "norm of a row", _NORM_COLOUR)
    if not shown:
        for axis in axes[0]:
            axis.set_axis_off()
        axes[0][0].set_title("no rows", loc="left")
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)


def _draw(axis: Any, histogram: Optional[Histogram], label: str, colour: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlabel(label, color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=_INK)
    if histogram is None:
        axis.text(0.5, 0.5, "none is finite", ha="center", va="center", transform=axis.transAxes)
        return
    edges = list(histogram.edges)
    if edges[0] == edges[-1]:  # one number: a bar of some width around it
        edges = [edges[0] - 0.5, edges[0] + 0.5]
    if histogram.logarithmic:
        _draw_by_factors(axis, histogram, colour)
        return
    if len(edges) > 2 and edges[-1] == edges[-2]:  # the last bin holds one whole number
        edges[-1] += edges[-2] - edges[-3]
    widths = [end - start for start, end in itertools.pairwise(edges)]
    axis.bar(edges[:-1], histogram.counts, widths, align="edge", color=colour, alpha=0.85, edgecolor="white")
    axis.margins(x=0.02)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if 1e3 <= max(map(abs, edges)) < 1e7:  # beyond, matplotlib's own way with powers of ten is shorter
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _draw_by_factors(axis: Any, histogram: Histogram, colour: str) -> None:
    """Bins that grow by a factor, as bars of one width named by where they begin, on a logarithmic scale of rows."""
    from matplotlib.ticker import EngFormatter

    places = range(len(histogram.counts))
    axis.bar(places, histogram.counts, width=1.0, edgecolor="white", color=colour, alpha=0.85)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    short = EngFormatter(sep="")  # 16384 is 16.4k
    names = [short.format_eng(float(f"{edge:.3g}")) for edge in histogram.edges[:-1]]
    axis.set_xticks([place - 0.5 for place in places], names, rotation=45, ha="right", fontsize="small")
