"""What a run shows and writes: the progress bar, the results on the terminal, the summary file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from demo_options import DemoOptions
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rows import CATEGORICAL
from torch import nn

from dynamicemb.shard import table_statistics


@dataclass(frozen=True)
class TableResult:
    """One embedding table after training, over all ranks. None where a static table has no such number.

    Attributes:
        dynamic: whether it is a hash table.
        size: rows in use.
        capacity: rows that fit.
        load_factor: size / capacity.
        hits, misses, evicted, refused: as in :class:`dynamicemb.shard.TableStatistics`.
    """

    dynamic: bool
    size: Optional[int]
    capacity: int
    load_factor: Optional[float]
    hits: Optional[int]
    misses: Optional[int]
    evicted: Optional[int]
    refused: Optional[int]


@dataclass(frozen=True)
class RunResult:
    """The summary file, key by key.

    Attributes:
        auc, log_loss: on the held-out rows; no AUC if all their labels are the same.
        rows: rows trained on, each epoch counted.
        eval_rows: held-out rows.
        ids_per_second: categorical ids trained on, of all ranks together; the median over the run.
        world_size: ranks.
        engine: "cpu" or "triton", of the dynamic tables.
        tables: by name.
    """

    auc: Optional[float]
    log_loss: float
    rows: int
    eval_rows: int
    ids_per_second: float
    world_size: int
    engine: str
    tables: dict[str, TableResult]


def table_results(model: nn.Module, options: DemoOptions) -> dict[str, TableResult]:
    """Every table of the sharded ``model`` by name. All ranks call it together."""
    statistics = table_statistics(model)
    results = {}
    for name in CATEGORICAL:
        if name in statistics:
            numbers = dataclasses.asdict(statistics[name])
            fields = {field.name for field in dataclasses.fields(TableResult)}
            results[name] = TableResult(dynamic=True, **{key: numbers[key] for key in numbers if key in fields})
        else:
            results[name] = TableResult(False, None, options.capacity, None, None, None, None, None)
    return results


@contextmanager
def training_progress(steps: int, shown: bool) -> Iterator[Callable[[int, float, float], None]]:
    """A progress bar, if ``shown``; calling its value with (steps done, loss, ids per second) moves it."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps  loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} ids/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"), speed=0.0)
        yield lambda done, loss, speed: progress.update(task, completed=done, loss=loss, speed=speed)


def print_resumed(path: Path, done: int, steps: int) -> None:
    left = "nothing is left to train" if done >= steps else f"{steps - done:,} are left"
    Console().print(f"resumed from {path}: {done:,} of {steps:,} steps done, {left}", highlight=False, soft_wrap=True)


def print_result(result: RunResult, saved: Optional[Path]) -> None:
    console = Console()
    speed = f"{result.ids_per_second:,.0f} ids/s, " if result.ids_per_second else ""
    auc = "undefined (one class only)" if result.auc is None else f"{result.auc:.4f}"
    console.print(
        f"held-out rows {result.eval_rows:,}   AUC {auc}   log loss {result.log_loss:.4f}\n"
        f"trained on {result.rows:,} rows, {speed}{result.world_size} rank(s), {result.engine} engine",
        highlight=False,
    )
    table = Table(box=box.SIMPLE)
    table.add_column("table")
    for heading in ("size", "capacity", "load", "hits", "misses", "evicted", "refused"):
        table.add_column(heading, justify="right")
    for name, row in result.tables.items():
        load = "-" if row.load_factor is None else f"{row.load_factor:.3f}"
        counts = (row.hits, row.misses, row.evicted, row.refused)
        size = _count(row.size) if row.dynamic else "static"
        table.add_row(name, size, _count(row.capacity), load, *map(_count, counts))
    console.print(table)
    if saved is not None:
        console.print(f"saved to {saved}", highlight=False, soft_wrap=True)


def _count(number: Optional[int]) -> str:
    return "-" if number is None else f"{number:,}"


def write_summary(result: RunResult, path: Path) -> None:
    """Writes ``result`` as JSON: to a file beside ``path`` first, so that ``path`` is never half written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    os.replace(partial, path)
