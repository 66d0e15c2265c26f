"""One histogram, and what all pictures have in common."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from dynamicemb.checkpoint.inspection.summary import Histogram

__all__ = ["INK", "NORM_COLOUR", "SCORE_COLOUR", "draw_histogram", "shortened"]

SCORE_COLOUR, NORM_COLOUR, INK = "#3b6fb6", "#c2702a", "#333333"
_SMALL_POINTS = 6


def shortened(name: str, columns: int) -> str:
    """``name`` with its middle left out if it is longer than ``columns``, and nothing that a font cannot show."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name).replace("$", r"\$")
    if len(name) <= columns:
        return name
    return f"{name[: columns - columns // 2 - 1]}…{name[-(columns // 2) :]}"


def draw_histogram(axis: Any, histogram: Optional[Histogram], colour: str, small: bool = False) -> None:
    """Draws a histogram into a matplotlib axis; None is one of no finite number. ``small``: few and small numbers."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, **({"labelsize": _SMALL_POINTS, "length": 2, "pad": 1} if small else {}))
    if histogram is None:
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "none is finite", ha="center", va="center", transform=axis.transAxes)
        return
    if histogram.logarithmic:
        _draw_by_factors(axis, histogram, colour, small)
        return
    edges = _drawn_edges(histogram)
    widths = [end - start for start, end in itertools.pairwise(edges)]
    axis.bar(edges[:-1], histogram.counts, widths, align="edge", color=colour, alpha=0.85, **_border(small))
    axis.margins(x=0.02)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(2 if small else 5, integer=True))
    if small:
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if max(map(abs, edges)) >= 1e3:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _in_full(value, 1e5 if small else 1e7)))


def _in_full(value: float, limit: float) -> str:
    """A number with all its digits below ``limit``."""
    return f"{value:,.0f}" if abs(value) < limit else f"{value:.3g}".replace("e+", "e")


def _border(small: bool) -> dict[str, Any]:
    return {"edgecolor": "white", "linewidth": 0.3 if small else 1.0}


def _drawn_edges(histogram: Histogram) -> list[float]:
    edges = list(histogram.edges)
    if edges[0] == edges[-1]:  # one number: a bar of some width around it
        return [edges[0] - 0.5, edges[0] + 0.5]
    if len(edges) > 2 and edges[-1] == edges[-2]:  # the last bin holds one whole number
        edges[-1] += edges[-2] - edges[-3]
    return edges


def _draw_by_factors(axis: Any, histogram: Histogram, colour: str, small: bool) -> None:
    """Bins that grow by a factor, as bars of one width named by where they begin, on a logarithmic scale of rows."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    places = range(len(histogram.counts))
    axis.bar(places, histogram.counts, width=1.0, color=colour, alpha=0.85, **_border(small))
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    short = EngFormatter(sep="")  # 16384 is 16.4k
    step = max(1, -(-len(places) // 4)) if small else 1
    named = list(places)[::step]
    starts = [float(f"{histogram.edges[place]:.{2 if small else 3}g}") for place in named]
    names = [short.format_eng(start) if start >= 1e3 else f"{start:g}" for start in starts]
    style = {} if small else {"rotation": 45, "ha": "right", "fontsize": "small"}
    axis.set_xticks([place - 0.5 for place in named], names, **style)
    if small:
        axis.yaxis.set_major_locator(LogLocator(numticks=3))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
