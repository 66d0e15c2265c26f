"""``dynamicemb inspect --plot``: the histograms as a picture that fits a screen, whatever the number of tables."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamicemb.errors import ConfigError

if TYPE_CHECKING:
    from dynamicemb.checkpoint.files.reader import StoredTable
    from dynamicemb.checkpoint.inspection.summary import TableSummary

__all__ = ["check_plot", "draw"]

Summaries = Sequence[tuple["StoredTable", "TableSummary"]]

#: Tables one below the other, each with its axes.
_MAX_LARGE = 4
#: Tables in a grid of small pictures. With more of them, numbers on axes would be too small to read.
_MAX_SMALL = 36
_SMALL_COLUMNS = 4
#: Inches of a place in the grid, of a line of places, and above them all.
_PLACE_INCHES, _LINE_INCHES, _HEAD_INCHES = 3.5, 1.4, 0.35
#: Characters of a title.
_LARGE_TITLE, _SMALL_TITLE = 60, 26
_DPI = 150
_MEANINGS = {"lru": "clock of the last lookup", "lfu": "occurrences", "customized": "customized score"}


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


def draw(summaries: Summaries, path: Path) -> None:
    """Draws scores and norms of every table that has rows: each with its histograms, or, if they are many, all of them
    side by side in one picture. No picture is higher than about 2,000 pixels."""
    from dynamicemb.cli.plot_histogram import INK
    from dynamicemb.cli.plot_many import draw_many

    shown = [(table, summary) for table, summary in summaries if summary.scores is not None]
    kind = _large if len(shown) <= _MAX_LARGE else _small if len(shown) <= _MAX_SMALL else draw_many
    figure = kind(shown)
    if shown and (empty := len(summaries) - len(shown)):
        note = f"{empty:,} table{'s' * (empty != 1)} without rows left out"
        figure.suptitle(note, x=0.01, ha="left", fontsize=9, color=INK)
    with warnings.catch_warnings():  # names in scripts that the font lacks are drawn as boxes, which shows by itself
        warnings.filterwarnings("ignore", category=UserWarning, message="Glyph ")
        figure.savefig(path, dpi=_DPI)


def _large(shown: Summaries) -> Any:
    """Scores left, norms right, one table below the other."""
    from matplotlib.figure import Figure

    from dynamicemb.cli.plot_histogram import INK, NORM_COLOUR, SCORE_COLOUR, draw_histogram, shortened

    figure = Figure(figsize=(10.0, 0.3 + 2.7 * max(1, len(shown))), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no rows", ha="center", va="center", color=INK)
        return figure
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (left, right), (table, summary) in zip(axes, shown):
        assert summary.scores is not None and summary.norms is not None
        name = shortened(f"{table.table} in {table.collection}", _LARGE_TITLE)
        left.set_title(name, loc="left", fontweight="bold", color=INK)
        right.set_title(f"{table.rows:,} rows", loc="right", color=INK)
        draw_histogram(left, summary.scores.histogram, SCORE_COLOUR)
        draw_histogram(right, summary.norms.histogram, NORM_COLOUR)
        left.set_xlabel(_MEANINGS[table.record.evict_strategy], color=INK)
        left.set_ylabel("rows", color=INK)
        right.set_xlabel("norm of a row", color=INK)
    return figure


def _small(shown: Summaries) -> Any:
    """A grid: in each place a table, its scores left and its norms right."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from dynamicemb.cli.plot_histogram import INK, NORM_COLOUR, SCORE_COLOUR, draw_histogram, shortened

    # Places are computed: matplotlib's own layouts take half a second for each of the axes.
    lines = -(-len(shown) // _SMALL_COLUMNS)
    height = _HEAD_INCHES + _LINE_INCHES * lines
    figure = Figure(figsize=(_SMALL_COLUMNS * _PLACE_INCHES, height))
    colours = ((SCORE_COLOUR, "rows by score"), (NORM_COLOUR, "rows by norm"))
    handles = [Patch(color=colour, label=label, alpha=0.85) for colour, label in colours]
    figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    for place, (table, summary) in enumerate(shown):
        assert summary.scores is not None and summary.norms is not None
        line, column = divmod(place, _SMALL_COLUMNS)
        top, left = height - _HEAD_INCHES - line * _LINE_INCHES, column / _SMALL_COLUMNS
        title = f"{shortened(table.table, _SMALL_TITLE)}: {table.rows:,} rows"
        style: dict[str, Any] = {"fontsize": 9, "fontweight": "bold", "color": INK}
        figure.text(left + 0.008, (top - 0.03) / height, title, ha="left", va="top", **style)
        bottom, tall = (top - _LINE_INCHES + 0.2) / height, (_LINE_INCHES - 0.45) / height
        for half, histogram in enumerate((summary.scores.histogram, summary.norms.histogram)):
            axis = figure.add_axes((left + 0.022 + half * 0.5 / _SMALL_COLUMNS, bottom, 0.1, tall))
            draw_histogram(axis, histogram, (SCORE_COLOUR, NORM_COLOUR)[half], small=True)
    return figure
