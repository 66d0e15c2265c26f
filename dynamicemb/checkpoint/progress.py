"""How far a dump or a load has come, on the terminal of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Reporter", "progress"]


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("? rows/s" if speed is None else f"{speed:,.0f} rows/s", style="progress.data.speed")


class Reporter:
    """Takes notice of rows that are done; what it shows is thrown away where nobody looks."""

    def __init__(self, bar: Progress, task: int) -> None:
        self._bar, self._task = bar, task

    def table(self, name: str) -> None:
        """The next rows belong to table ``name``."""
        self._bar.update(self._task, table=name)  # type: ignore[arg-type]

    def advance(self, rows: int) -> None:
        self._bar.advance(self._task, rows)  # type: ignore[arg-type]


@contextmanager
def progress(action: str, rows: int, shown: bool) -> Iterator[Reporter]:
    """A bar with rows per second and the time left, on stderr, if ``shown`` and stderr is a terminal.

    Args:
        action: what is done, such as ``dump``.
        rows: rows in all, of this rank.
        shown: False on all ranks but one.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _RowsPerSecond(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[table]}"),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )
    with bar:
        yield Reporter(bar, bar.add_task(action, total=rows, table=""))
