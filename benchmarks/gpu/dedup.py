"""Topic: deduplication of a batch beside ``torch.unique``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from figures import CheckError, Figure, Target
from timing import ratio

from dynamicemb.kernels.dedup import dedup
from gpu import traffic
from gpu.device import NeedsGpuError
from gpu.ids import Batch, IdSource, count_unique
from gpu.rounds import in_turns, timed
from gpu.topic import Case, Context, Measured, Topic

__all__ = ["DRY", "FULL", "Size", "topic"]

#: Batches of one configuration take at least this much together, more than a GPU's cache.
ROTATION_BYTES = 128 << 20
MOST_BATCHES = 64


@dataclass(frozen=True)
class Size:
    """How much is measured: ids of a batch, numbers of tables, distinct ids to draw from, rounds."""

    ids: tuple[int, ...]
    tables: tuple[int, ...]
    universe: int
    rounds: int
    warm_up: int
    most_batches: int


FULL = Size((1 << 16, 1 << 18, 1 << 20, 1 << 22), (1, 10), 16_800_000, rounds=12, warm_up=2, most_batches=MOST_BATCHES)
DRY = Size((1 << 9,), (1, 2), 2_000, rounds=2, warm_up=1, most_batches=3)


def _combined(batch: Batch) -> torch.Tensor:
    """int64 [N], one number for table and id, so that torch.unique can tell tables apart."""
    return batch.ids + (batch.tables.long() << 40)


def _torch_unique(numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result: tuple[torch.Tensor, ...] = torch.unique(numbers, return_inverse=True, return_counts=True)
    return result


def check(batch: Batch, tables: int) -> None:
    """Compares one batch with torch.unique.

    Raises:
        CheckError: a different number of distinct ids, an id that does not come back, or a different count.
    """
    mine = dedup(batch.ids, batch.tables, tables, 1)
    distinct, inverse, counts = _torch_unique(_combined(batch))
    if int(mine.count) != distinct.numel():
        raise CheckError(f"{int(mine.count)} distinct ids, torch.unique finds {distinct.numel()}")
    if not torch.equal(mine.keys[mine.inverse], batch.ids) or not torch.equal(mine.tables[mine.inverse], batch.tables):
        raise CheckError("an id does not come back through the inverse")
    if not torch.equal(mine.offsets.diff()[mine.inverse], counts[inverse]):
        raise CheckError("counts differ from torch.unique's")


def _replayed(context: Context, batch: Batch, tables: int, samples: int) -> list[float]:
    """Seconds of a deduplication that the host launches as one CUDA graph."""

    def run() -> None:
        dedup(batch.ids, batch.tables, tables, 1)

    replay = context.device.capture(run)
    return timed(context.device, lambda index: replay(), samples, repetitions=4)


def _measure(context: Context, size: Size, ids: int, tables: int, uniform: bool, deadline: float) -> Measured:
    source = IdSource(tables, size.universe // tables, context.torch_device)
    per_table = ids // tables
    draw: Callable[[int], Batch] = source.uniform if uniform else source.power_law
    count = max(2, min(size.most_batches, ROTATION_BYTES // (12 * ids)))
    batches = [draw(per_table) for _ in range(count)]
    numbers = [_combined(batch) for batch in batches]
    check(batches[0], tables)
    unique = count_unique(batches[0])

    def ours(index: int, lap: Callable[[str], None]) -> None:
        batch = batches[index % count]
        dedup(batch.ids, batch.tables, tables, 1)
        lap("dedup")

    def theirs(index: int, lap: Callable[[str], None]) -> None:
        _torch_unique(numbers[index % count])
        lap("dedup")

    turns = in_turns(context.device, {"ours": ours, "torch": theirs}, size.rounds, size.warm_up, deadline)
    seconds = {name: [lap["dedup"] for lap in laps] for name, laps in turns.laps.items()}
    name = f"{per_table * tables:,} ids, {'uniform' if uniform else 'power law'}, {_tables(tables)}"
    work = traffic.dedup(per_table * tables, unique)
    reason = "one sort of 32-bit prefixes, inputs, outputs"
    figures = [
        context.time_figure(f"{name}: dedup", seconds["ours"], work, reason, unit="µs"),
        context.time_figure(f"{name}: torch.unique", seconds["torch"], unit="µs"),
        Figure(
            f"{name}: dedup / torch.unique", "×", ratio(turns.laps["ours"], turns.laps["torch"]), None,
            f"{unique:,} distinct ids", Target(1.0, at_least=False),
        ),
    ]  # fmt: skip
    series = {f"{name}, {side}, s": times for side, times in seconds.items()}
    left_out = {}
    try:
        replayed = _replayed(context, batches[0], tables, size.rounds)
        figures.append(context.time_figure(f"{name}: dedup as a graph", replayed, work, reason, unit="µs"))
        series[f"{name}, replayed, s"] = replayed
    except NeedsGpuError as failure:
        left_out["dedup as a graph"] = str(failure)
    return Measured(figures, series, left_out)


def _tables(count: int) -> str:
    return "1 table" if count == 1 else f"{count} tables"


def topic(context: Context) -> Topic:
    """One case for each number of ids, number of tables and distribution."""
    size = DRY if context.dry else FULL
    cases = []
    for ids in reversed(size.ids):
        for tables in size.tables:
            for uniform in (False, True):

                def run(deadline: float, ids: int = ids, tables: int = tables, uniform: bool = uniform) -> Measured:
                    return _measure(context, size, ids, tables, uniform, deadline)

                law = "uniform" if uniform else "power law"
                cases.append(Case(f"{ids:,} ids, {law}, {_tables(tables)}", run, 2))
    return Topic(
        name="dedup",
        title="Deduplication of a batch, beside torch.unique",
        setup=(
            f"Ids drawn from {size.universe:,}, uniformly or from a power law with exponent 1.05; torch.unique gets "
            "table and id as one number, returns inverse and counts, and waits for the device, which ours does not. "
            f"Different batches in rotation, both sides in turn, {size.rounds} rounds after {size.warm_up}. As a "
            "graph: the same launches replayed as one CUDA graph, which leaves out the host."
        ),
        check="Number of distinct ids, every id through the inverse, and every count equal torch.unique's.",
        cases=cases,
    )
