"""What the command prints: tables that fit 80 columns, bars, one JSON document with ``--json``, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dynamicemb.cli.launch import record_failure

__all__ = [
    "BAR_COLUMNS",
    "bar",
    "count",
    "fields",
    "number",
    "print_json",
    "progress",
    "screen",
    "show",
    "size",
    "table",
    "text",
    "warn",
]

#: Columns of a bar at its full length.
BAR_COLUMNS = 24


def screen() -> Console:
    """Standard output: colours on a terminal only, and no guesses at what a number or a path could mean."""
    return Console(highlight=False, soft_wrap=False)


def _error_screen() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def warn(label: str, message: str) -> None:
    """One line on stderr, such as ``error: ...``. An error is also what torchrun shows as the reason of its own."""
    line = Text(f"{label}: ", style="bold red" if label == "error" else "yellow")
    _error_screen().print(line.append(" ".join(message.split()), style="default not bold"))
    if label == "error":
        record_failure(line.plain)


def print_json(document: Any) -> None:
    """``document`` on stdout. Numbers that JSON does not have (infinities, NaN) become null."""
    sys.stdout.write(json.dumps(_json_numbers(document), indent=2) + "\n")


def _json_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_numbers(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_numbers(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(value: str) -> str:
    """A name from a file, to be shown as it is: without meaning for colours, and on one line."""
    return escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value))


def count(value: int) -> str:
    return f"{value:,}"


def number(value: Optional[float]) -> str:
    """Six digits at most; integers in full."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def size(num_bytes: int) -> str:
    """Such as ``1.2 GB``, in powers of 1000."""
    return decimal(num_bytes)


def bar(share: float, columns: int = BAR_COLUMNS) -> str:
    """A bar for ``share`` (0 to 1) of ``columns``, at least a sliver of it if there is anything."""
    if share <= 0:
        return ""
    if "utf" not in (sys.stdout.encoding or "").lower():
        return "#" * max(1, round(share * columns))
    eighths = max(1, round(share * columns * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def table(*columns: str) -> Table:
    """A table; a heading that starts with ``<`` is of text, which may be folded, one that starts with ``|`` of bars,
    others of numbers, which are never broken."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    for column in columns:
        if column.startswith("<"):
            result.add_column(column[1:], overflow="fold")
        elif column.startswith("|"):
            result.add_column(column[1:], no_wrap=True, overflow="crop")
        else:
            result.add_column(column, justify="right", no_wrap=True)
    return result


def show(console: Console, shown: Union[Table, Text], title: Optional[str] = None) -> None:
    """A table under its title, and an empty line."""
    if title is not None:
        console.print(f"  [bold]{title}[/bold]", soft_wrap=True)
    console.print(Padding(shown, (0, 0, 1, 1), expand=False))


def fields(entries: Sequence[tuple[str, str]]) -> Table:
    """Names and what they are, one below the other."""
    result = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in entries:
        result.add_row(f"  {name}", value)
    return result


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        shown = f"{decimal(int(speed))}/s" if self._unit == "bytes" else f"{speed:,.0f} {self._unit}/s"
        return Text(shown, style="progress.data.speed")


@contextmanager
def progress(action: str, unit: str = "rows") -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal; it is gone at the end.

    Yields:
        What moves it: called with (what is worked on, done, total).
    """
    console = _error_screen()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Speed(unit))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(action, total=None)

        def move(name: str, done: int, total: int) -> None:
            shown.update(task, description=f"{action} {text(name)}", completed=done, total=total)

        yield move
