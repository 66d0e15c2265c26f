"""Cost beside the number of rows: filling, training and finding from ten thousand rows to ten million, and growth.

A step that does nothing special must cost what its neighbours cost. The same run is repeated on the same ids, and what
counts for each step is its fastest repetition: a delay from outside does not hit the same step every time.

What explains the curve is measured beside it: the phases of a filling step, its page faults, the part of the table that
is in huge pages, and what single accesses cost with pages of either size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from figures import CheckError, Figure, Findings, Spread, Target
from host import BUCKET_BYTES, MemoryCosts
from pages import CHAINS, PageCosts, faults, huge_share
from timing import uncollected
from workload import LEARNING_RATE, DynamicTable, PowerLaw, mean_unique, roomy_capacity

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.find import find
from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, OptimizerKind
from dynamicemb.table import group as table_group
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["FULL", "QUICK", "Size", "measure", "trend"]

OPTIMIZER = OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD, LEARNING_RATE)
#: Steps on each side that make up the trend at a step.
TREND_STEPS = 4
#: A step this far above the trend is a step that needs an explanation.
MAX_OVER_TREND = 1.5
#: Largest exponent e of cost ~ rows**e that passes for linear: it lets rows that no longer fit into a cache, over
#: three decades, cost 1.4 times as much each.
MAX_EXPONENT = 1.05
#: Largest time to fill the largest table, over what memory says.
MAX_FILL_OVER_EXPECTED = 3.0
#: The phases of a filling step, by the name of their kernel.
PHASES = {"dedup": "sort", "find": "find", "insert": "insert", "fill": "first values", "gather": "gather"}
#: The logger through which tables announce that they grow.
GROWTH_LOGGER = "dynamicemb.table.group"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        rows: numbers of rows of the tables.
        dim: columns.
        ids: of a step.
        rounds: training steps of each kind.
        repetitions: of each fill and of the growth run.
        growth_rows: that the growing table ends with.
        growth_doublings: it takes until then.
        threads: of torch.
    """

    rows: tuple[int, ...]
    dim: int
    ids: int
    rounds: int
    repetitions: int
    growth_rows: int
    growth_doublings: int
    threads: int = 2


FULL = Size((10**4, 10**5, 10**6, 10**7), 16, 65_536, rounds=12, repetitions=4, growth_rows=3_000_000,
            growth_doublings=5)  # fmt: skip
QUICK = Size((10**4, 10**5, 10**6), 16, 16_384, rounds=4, repetitions=2, growth_rows=300_000, growth_doublings=3)


class _Announcements(logging.Handler):
    """Counts what the tables announce."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def trend(seconds: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    """What a step at each place is expected to cost: the median of its ordinary neighbours, itself left out.

    Args:
        seconds: float [steps].
        ordinary: bool [steps], steps that nothing special happens in.
    """
    result = np.empty_like(seconds)
    for step in range(seconds.size):
        near = np.abs(np.arange(seconds.size) - step)
        neighbours = seconds[ordinary & (near > 0) & (near <= TREND_STEPS)]
        result[step] = np.median(neighbours) if neighbours.size else seconds[step]
    return result


def _seconds_by_step(table: DynamicTable, ids: torch.Tensor, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Inserts ``ids``; (seconds, slots afterwards) of each step."""
    seconds, slots = [], []
    with uncollected():
        for batch in ids.split(size.ids):
            start = time.perf_counter()
            table.train(batch)
            seconds.append(time.perf_counter() - start)
            slots.append(table.group.storage.geometries[0].slots)
    return np.array(seconds), np.array(slots)


@dataclass(frozen=True)
class Filling:
    """What it took to fill a table.

    Attributes:
        fastest: seconds of each step, of its fastest repetition.
        phases: seconds in each phase, of the fastest run.
        faults: page faults, of the run with the fewest.
        huge_share: of the rows' memory that is in use, the part in huge pages.
    """

    fastest: np.ndarray
    phases: dict[str, float]
    faults: int
    huge_share: float


@contextmanager
def _timed_phases() -> Iterator[dict[str, float]]:
    """The seconds that lookups spend in each phase."""
    seconds = dict.fromkeys(PHASES.values(), 0.0)

    def timed(kernel: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = kernel(*arguments, **named)
            seconds[phase] += time.perf_counter() - start
            return result

        return call

    with ExitStack() as patches:
        for name, phase in PHASES.items():
            kernel = timed(getattr(table_group, name), phase)
            patches.enter_context(mock.patch.object(table_group, name, kernel))
        yield seconds


def _fill(rows: int, ids: torch.Tensor, size: Size) -> tuple[DynamicTable, Filling]:
    """A table filled with ``ids``, and what that took."""
    runs, runs_phases, runs_faults = [], [], []
    for _ in range(size.repetitions):
        table = DynamicTable(size.dim, roomy_capacity(rows), OPTIMIZER)
        before = faults()
        with _timed_phases() as phases:
            seconds, _ = _seconds_by_step(table, ids, size)
        runs.append(seconds)
        runs_phases.append(phases)
        runs_faults.append(faults() - before)
    counters = table.group.counters()[0]
    if counters.size != rows or counters.evicted:
        raise CheckError(f"{counters.size} of {rows} rows are in the table, {counters.evicted} were evicted")
    return table, Filling(
        fastest=np.min(runs, axis=0),
        phases=runs_phases[int(np.argmin(np.sum(runs, axis=1)))],
        faults=min(runs_faults),
        huge_share=huge_share(table.group.storage.chunks[0][0].rows),
    )


def _filling_figures(rows: int, size: Size, filling: Filling, expected: float) -> list[Figure]:
    """``expected``: nanoseconds for each row."""
    name = f"{rows:,} rows: filling"
    figures = [
        Figure(name, "ns/row", Spread.of(1e9 * filling.fastest / np.minimum(size.ids, rows)), expected,
               "one sort, one bucket, one row to the table and one to the batch"),
    ]  # fmt: skip
    figures += [
        Figure(f"{name}, {phase}", "ns/row", Spread.exact(1e9 * seconds / rows))
        for phase, seconds in filling.phases.items()
    ]
    figures += [
        Figure(f"{name}, page faults", "per 1000 rows", Spread.exact(1e3 * filling.faults / rows)),
        Figure(f"{name}, rows in huge pages", "%", Spread.exact(1e2 * filling.huge_share)),
    ]
    return figures


def _train_spread(table: DynamicTable, batches: list[torch.Tensor], size: Size) -> Spread:
    """Nanoseconds for each id of a training step."""
    gradient = torch.randn(size.ids, size.dim)
    nanoseconds = []
    with uncollected():
        for batch in [batches[0], *batches]:
            start = time.perf_counter()
            table.train(batch).backward(gradient)
            nanoseconds.append(1e9 * (time.perf_counter() - start) / batch.numel())
    return Spread.of(nanoseconds[1:])


def _find_spread(table: DynamicTable, batches: list[torch.Tensor]) -> Spread:
    """Nanoseconds for each distinct id that is found."""
    nanoseconds = []
    for batch in [batches[0], *batches]:
        unique = dedup(batch, torch.zeros(batch.numel(), dtype=torch.int32), num_tables=1, world_size=1)
        start = time.perf_counter()
        slots = find(table.group.storage.view, unique)
        nanoseconds.append(1e9 * (time.perf_counter() - start) / slots.numel())
        if (slots < 0).any():
            raise CheckError("an id that was inserted is not found")
    return Spread.of(nanoseconds[1:])


def _expected_fill(size: Size, row_bytes: int, state_bytes: int, costs: MemoryCosts) -> float:
    """Nanoseconds for each row; rows that are new are written twice, to the table and to the batch."""
    moved = BUCKET_BYTES + 2 * row_bytes + state_bytes
    return 1e9 / costs.sorted_ids_per_s + 1e9 * moved / costs.random_bytes_per_s


def _figures_of_rows(rows: int, size: Size, costs: MemoryCosts) -> tuple[list[Figure], np.ndarray]:
    """Figures of one table, and the fastest time of each step that filled it."""
    law = PowerLaw(rows)
    table, filling = _fill(rows, law.every_id(), size)
    layout = table.group.storage.layout
    row_bytes, state_bytes = size.dim * 4, layout.row_bytes - size.dim * 4
    expected_fill = _expected_fill(size, row_bytes, state_bytes, costs)
    figures = _filling_figures(rows, size, filling, expected_fill)
    if rows == max(size.rows):
        figures.append(
            Figure(f"{rows:,} rows: filling / what memory says", "×",
                   Spread.exact(1e9 * filling.fastest.sum() / rows / expected_fill), 1.0, "nothing but memory",
                   Target(MAX_FILL_OVER_EXPECTED, at_least=False))
        )  # fmt: skip
    for name, draw in (("uniform", law.draw_uniformly), ("power law", law.draw)):
        batches = [draw(size.ids) for _ in range(size.rounds)]
        unique = mean_unique(batches)
        expected = costs.forward_seconds(size.ids, unique, row_bytes)
        expected += costs.backward_seconds(size.ids, unique, row_bytes, state_bytes)
        figures.append(
            Figure(f"{rows:,} rows: training, {name}", "ns/id", _train_spread(table, batches, size),
                   1e9 * expected / size.ids, f"{unique:,.0f} distinct ids a step")
        )  # fmt: skip
    batches = [law.draw_uniformly(size.ids) for _ in range(size.rounds)]
    figures.append(
        Figure(f"{rows:,} rows: finding", "ns/distinct id", _find_spread(table, batches),
               1e9 * BUCKET_BYTES / costs.random_bytes_per_s, "a bucket's digests and one key")
    )  # fmt: skip
    return figures, filling.fastest


def _page_figures() -> list[Figure]:
    """What accesses cost on one thread, with small pages and with huge ones."""
    figures = []
    for huge, name in ((False, "pages of 4 KiB"), (True, "pages of 2 MiB")):
        costs = PageCosts.measured(huge)
        figures += [
            Figure(f"{name}: first access to 4 KiB", "ns", Spread.exact(costs.first_access)),
            Figure(f"{name}: random read after another", "ns", Spread.exact(costs.dependent_read)),
            Figure(f"{name}: random read, {CHAINS} under way", "ns", Spread.exact(costs.read)),
        ]
    return figures


def _worst_over_trend(seconds: np.ndarray, ordinary: np.ndarray) -> float:
    """The ordinary step that is furthest above the trend, as a multiple of it. The first and the last step are left
    out: one touches everything for the first time, the other may be short."""
    inner = ordinary.copy()
    inner[[0, -1]] = False
    multiples = (seconds / trend(seconds, ordinary))[inner]
    return float(multiples.max()) if multiples.size else 1.0


def _growth_run(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """The fastest time of each step, and the slots after it; every growth must have been announced, and move nothing
    to where it is not found."""
    ids = PowerLaw(size.growth_rows).every_id()
    capacity = 2 * size.growth_rows
    announcements, logger = _Announcements(), logging.getLogger(GROWTH_LOGGER)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(announcements)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    fastest = np.full(len(ids.split(size.ids)), np.inf)
    try:
        for _ in range(size.repetitions):
            table = DynamicTable(size.dim, capacity, OPTIMIZER, init_capacity=capacity >> size.growth_doublings)
            seconds, slots = _seconds_by_step(table, ids, size)
            fastest = np.minimum(fastest, seconds)
    finally:
        logger.removeHandler(announcements)
        logger.setLevel(level)
        logger.propagate = propagate
    doublings = len(table.group.storage.chunks[0]) - 1
    if announcements.count != doublings * size.repetitions:
        raise CheckError(f"{doublings} doublings, {announcements.count / size.repetitions:g} of them announced")
    sample = ids[: size.ids]
    at_once = DynamicTable(size.dim, capacity, OPTIMIZER)
    if table.group.counters()[0].size != size.growth_rows or not torch.equal(
        table.train(sample), at_once.train(sample)
    ):
        raise CheckError("the table that grew does not hold the rows that were put into it")
    return fastest, slots


def _growth_figures(size: Size, costs: MemoryCosts) -> tuple[list[Figure], np.ndarray]:
    seconds, slots = _growth_run(size)
    grew = np.diff(slots, prepend=slots[0]) > 0
    usual = trend(seconds, ~grew)
    row_bytes = DynamicTable(size.dim, 1, OPTIMIZER).group.storage.layout.row_bytes
    figures = []
    for step in np.flatnonzero(grew):
        rows = min((int(step) + 1) * size.ids, size.growth_rows)
        # Every key is read; half of the entries are read and written; the batch is looked for once more.
        moved = rows * METADATA_BYTES_PER_SLOT + rows * (row_bytes + METADATA_BYTES_PER_SLOT) + size.ids * BUCKET_BYTES
        figures.append(
            Figure(f"growth to {slots[step]:,} slots: pause", "ms",
                   Spread.exact(1e3 * max(seconds[step] - usual[step], 0.0)), 1e3 * moved / costs.random_bytes_per_s,
                   f"every key read, half of {rows:,} rows moved; other steps there take {1e3 * usual[step]:.1f} ms")
        )  # fmt: skip
    figures.append(
        Figure("growing: worst step without growth / trend", "×", Spread.exact(_worst_over_trend(seconds, ~grew)), 1.0,
               "nothing is put off to a later step", Target(MAX_OVER_TREND, at_least=False))
    )  # fmt: skip
    return figures, seconds


def measure(size: Size) -> Findings:
    """Measures tables of every number of rows, then one that grows.

    Raises:
        CheckError: a table does not hold the rows that were put into it, or grew without saying so.
    """
    torch.set_num_threads(size.threads)
    costs = MemoryCosts.measured()
    DynamicTable(size.dim, 1024, OPTIMIZER).train(torch.arange(512)).sum().backward()  # compiles the kernels
    figures = _page_figures()
    series: dict[str, list[float]] = {}
    totals, worst = [], 1.0
    for rows in size.rows:
        more, fill = _figures_of_rows(rows, size, costs)
        figures += more
        series[f"{rows} rows, filling, ms by step"] = (1e3 * fill).tolist()
        totals.append(fill.sum())
        worst = max(worst, _worst_over_trend(fill, np.ones(fill.size, dtype=bool)))
    exponent = float(np.polyfit(np.log(size.rows), np.log(totals), 1)[0])
    figures += [
        Figure("filling: exponent e of time ~ rows**e", "", Spread.exact(exponent), 1.0, "linear",
               Target(MAX_EXPONENT, at_least=False)),
        Figure("filling: worst step / trend", "×", Spread.exact(worst), 1.0, "nothing is put off to a later step",
               Target(MAX_OVER_TREND, at_least=False)),
    ]  # fmt: skip
    growth, seconds = _growth_figures(size, costs)
    series["growing, ms by step"] = (1e3 * seconds).tolist()
    return Findings(
        name="scaling",
        title="Cost beside the number of rows",
        setup=(
            f"{size.threads} threads, dim {size.dim}, row-wise Adagrad, {size.ids:,} ids a step; {size.rounds} "
            f"training steps each; fill and growth run {size.repetitions} times, of each step the fastest time counts; "
            f"the trend at a step is the median of the {TREND_STEPS} steps on each side of it. Phases are those of the "
            "fastest run."
        ),
        check=(
            "Every row that was put in is found, none was evicted; each growth was announced, and the table that grew "
            "gives the rows of one that did not."
        ),
        figures=[*figures, *growth],
        series=series,
    )
