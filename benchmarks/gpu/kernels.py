"""Topic: how close the kernels that move rows, gathers and the fused update, come to the speed of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from figures import CheckError, Figure, Spread, Target
from workload import LEARNING_RATE

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather, gather_rows
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS, OptimizerKind, RowLayout, TableGeometry, table_bytes
from dynamicemb.kernels.update import update
from dynamicemb.kernels.views import Scores, UniqueKeys
from dynamicemb.table.optimizers import OptimizerConfig
from dynamicemb.table.storage import GroupStorage
from gpu import traffic
from gpu.ids import Batch, IdSource
from gpu.optimizer_formulas import embeddings_of, states_of, updated
from gpu.published import NAMES
from gpu.rounds import timed
from gpu.tables import BUCKET_CAPACITY, capacity_for
from gpu.topic import Case, Context, Measured, Topic
from gpu.traffic import Traffic

__all__ = ["DRY", "FULL", "Size", "topic"]

#: Of the copy bandwidth.
TARGET_PERCENT = 75.0
#: Sums of up to 10,000 positive float32 against float64, and a row rounded to its dtype.
CHECK_RTOL = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}
#: Distinct ids whose rows are computed again.
CHECKED_ROWS = 4096
LAWS = ("uniform", "power law")


@dataclass(frozen=True)
class Size:
    """How much is measured: tables, rows of each, dims, dtypes, ids of a step and table, batches, samples."""

    tables: int
    rows: int
    dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ids_per_table: int
    batches: int
    samples: int

    @property
    def ids(self) -> int:
        return self.tables * self.ids_per_table


FULL = Size(10, 400_000, (128, 32, 512), (torch.float32, torch.bfloat16), 104_857, batches=6, samples=12)
DRY = Size(2, 500, (8,), (torch.float32, torch.bfloat16), 150, batches=2, samples=2)


@dataclass(frozen=True)
class Lookup:
    """A batch, deduplicated and found."""

    batch: Batch
    unique: UniqueKeys
    slots: torch.Tensor
    distinct: int


class Tables:
    """A group's memory with every id in it and noise in the rows, driven by kernels alone.

    Args:
        size: of it.
        layout: of the rows.
        device: where it lives.
    """

    def __init__(self, size: Size, layout: RowLayout, device: torch.device) -> None:
        capacity = capacity_for(size.rows)
        geometry = TableGeometry.create(capacity, capacity, BUCKET_CAPACITY)
        self.size, self.layout = size, layout
        self.storage = GroupStorage([geometry] * size.tables, layout, 1, device)
        self.source = IdSource(size.tables, size.rows, device)
        for first in range(0, size.rows, size.ids_per_table):
            batch = self.source.every(first, min(size.ids_per_table, size.rows - first))
            unique = dedup(batch.ids, batch.tables, size.tables, 1)
            scores = Scores(torch.ones_like(unique.keys))
            insert(self.storage.view, unique, find(self.storage.view, unique), scores)
        for chunks in self.storage.chunks:
            # Neither zeros, which can be faster, nor garbage, which may be no number; states may not be negative.
            embeddings_of(chunks[0].rows, layout).uniform_(0.5, 1.5)
            if layout.state_width:
                states_of(chunks[0].rows, layout).uniform_(0.5, 1.5)

    def look_up(self, batch: Batch) -> Lookup:
        """Synchronises.

        Raises:
            CheckError: an id is not there.
        """
        unique = dedup(batch.ids, batch.tables, self.size.tables, 1)
        slots = find(self.storage.view, unique)
        distinct = int(unique.count)
        if bool((slots[:distinct] < 0).any()):
            raise CheckError("an id has no slot in tables that should hold all of them")
        return Lookup(batch, unique, slots, distinct)

    def stored(self, slots: torch.Tensor) -> torch.Tensor:
        """uint8 [R, row_bytes], copies of the rows at these slot handles. Synchronises."""
        rows = torch.empty(slots.numel(), self.layout.row_bytes, dtype=torch.uint8, device=slots.device)
        for table, chunks in enumerate(self.storage.chunks):
            here = slots >> CHUNK_SHIFT == table * MAX_CHUNKS
            rows[here] = chunks[0].rows[slots[here] & ((1 << CHUNK_SHIFT) - 1)]
        return rows


def _check_gather(tables: Tables, lookup: Lookup) -> None:
    """Compares with rows that torch picked, bit for bit."""
    rows = gather(tables.storage.view, lookup.slots, lookup.unique.inverse)
    picked = embeddings_of(tables.stored(lookup.slots[lookup.unique.inverse[:CHECKED_ROWS]]), tables.layout).float()
    if not torch.equal(rows[:CHECKED_ROWS], picked):
        raise CheckError("gathered rows differ from those in the table")


def _check_gather_rows(rows: torch.Tensor, lookup: Lookup) -> None:
    """Compares with what torch picks, bit for bit."""
    if not torch.equal(gather_rows(rows, lookup.unique.inverse), rows.index_select(0, lookup.unique.inverse)):
        raise CheckError("gathered rows of a tensor differ from those that torch picks")


def _check_update(tables: Tables, lookup: Lookup, gradient: torch.Tensor, optimizer: OptimizerConfig) -> None:
    """Applies one update and compares some rows and states with formulas in float64."""
    layout, inverse = tables.layout, lookup.unique.inverse
    some = min(CHECKED_ROWS, lookup.distinct)
    slots = lookup.slots[:some]
    before = tables.stored(slots)
    chosen = inverse < some
    sums = torch.zeros(some, layout.dim, dtype=torch.float64, device=gradient.device)
    sums.index_add_(0, inverse[chosen], gradient[chosen].double())
    weights, states = embeddings_of(before, layout).double(), states_of(before, layout).double()
    weights, states = updated(weights, states, sums, optimizer, step=1)
    _run_update(tables, lookup, gradient, optimizer)
    after = tables.stored(slots)
    rtol = CHECK_RTOL[layout.embedding_dtype]
    # A weight may end near zero: what it lost is then as uncertain as what it was.
    tolerance = rtol * (1.0 + weights.abs() + (weights - embeddings_of(before, layout).double()).abs())
    if bool(((embeddings_of(after, layout).double() - weights).abs() > tolerance).any()):
        raise CheckError(f"{NAMES[optimizer.kind]}: rows differ from the formula's")
    if not torch.allclose(states_of(after, layout).double(), states, rtol=CHECK_RTOL[torch.float32], atol=0):
        raise CheckError(f"{NAMES[optimizer.kind]}: optimizer states differ from the formula's")


def _run_update(tables: Tables, lookup: Lookup, gradient: torch.Tensor, optimizer: OptimizerConfig) -> None:
    hyperparameters, steps = _hyperparameters(tables, optimizer)
    update(
        tables.storage.view,
        lookup.unique,
        lookup.slots,
        gradient,
        hyperparameters,
        steps,
        optimizer.applied_weight_decay,
    )


def _hyperparameters(tables: Tables, optimizer: OptimizerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    count, device = tables.size.tables, tables.storage.device
    numbers = torch.tensor([optimizer.hyperparameters()] * count, dtype=torch.float64, device=device)
    return numbers, torch.zeros(count, dtype=torch.int64, device=device)


def _percent(context: Context, name: str, seconds: list[float], work: Traffic, reason: str) -> Figure:
    """Bytes over time, as a share of the copy bandwidth."""
    ceilings = context.ceilings
    shares = [100 * (ceilings.copy_share(work.num_bytes, second) or 0.0) for second in seconds]
    least = ceilings.seconds(work)
    expected = None if least is None else 100 * (ceilings.copy_share(work.num_bytes, least) or 0.0)
    spread = Spread.of(shares)
    return Figure(
        name, "% of copy", spread, expected, f"{1e6 * Spread.of(seconds).median:,.0f} µs; {reason}",
        Target(TARGET_PERCENT, at_least=True), work.num_bytes, spread.median / 100,
    )  # fmt: skip


def _measure_law(
    context: Context, size: Size, tables: Tables, law: str, optimizer: OptimizerConfig, gradient: torch.Tensor
) -> Measured:
    draw: Callable[[int], Batch] = tables.source.uniform if law == "uniform" else tables.source.power_law
    lookups = [tables.look_up(draw(size.ids_per_table)) for _ in range(size.batches)]
    _check_gather(tables, lookups[0])
    _check_update(tables, lookups[0], gradient, optimizer)
    distinct = sum(lookup.distinct for lookup in lookups) / len(lookups)
    commonest = int(lookups[0].unique.offsets.diff().max())
    layout, view = tables.layout, tables.storage.view
    name = f"{_dtype_name(layout.embedding_dtype)} rows of {layout.dim}, {law}"
    reason = f"{distinct:,.0f} distinct ids, the commonest {commonest:,} times"
    measured = Measured()
    if optimizer.kind is OptimizerKind.SGD:  # gathers do not depend on the optimizer
        received = torch.rand(size.ids, layout.dim, device=view.device).to(layout.embedding_dtype)
        _check_gather_rows(received, lookups[0])

        def gather_one(index: int) -> object:
            lookup = lookups[index % len(lookups)]
            return gather(view, lookup.slots, lookup.unique.inverse)

        def expand_one(index: int) -> object:
            return gather_rows(received, lookups[index % len(lookups)].unique.inverse)

        _add(context, measured, f"gather, {name}", gather_one, traffic.gather(size.ids, distinct, layout), reason, size)
        work = traffic.gather_rows(size.ids, distinct, layout.dim * layout.embedding_dtype.itemsize)
        _add(context, measured, f"expand, {name}", expand_one, work, reason, size)
    hyperparameters, steps = _hyperparameters(tables, optimizer)

    def update_one(index: int) -> None:
        lookup = lookups[index % len(lookups)]
        update(view, lookup.unique, lookup.slots, gradient, hyperparameters, steps, optimizer.applied_weight_decay)

    work = traffic.update(size.ids, distinct, layout)
    _add(context, measured, f"update, {NAMES[optimizer.kind]}, {name}", update_one, work, reason, size)
    return measured


def _add(
    context: Context, measured: Measured, name: str, function: Callable[[int], object], work: Traffic, reason: str,
    size: Size,
) -> None:  # fmt: skip
    seconds = timed(context.device, function, size.samples, repetitions=2)
    measured.figures.append(_percent(context, name, seconds, work, reason))
    measured.series[f"{name}, s"] = seconds


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measure(context: Context, size: Size, layout: RowLayout) -> Measured:
    tables = Tables(size, layout, context.torch_device)
    optimizer = OptimizerConfig(layout.optimizer, LEARNING_RATE)
    generator = torch.Generator(context.torch_device).manual_seed(1)
    gradient = torch.rand(size.ids, layout.dim, generator=generator, device=context.torch_device) + 0.5
    total = Measured()
    for law in LAWS:
        measured = _measure_law(context, size, tables, law, optimizer, gradient)
        total.figures += measured.figures
        total.series |= measured.series
    return total


def _memory_bytes(size: Size, layout: RowLayout) -> int:
    """Tables, gradients, rows that come out and rows that go in, twice where they are compared, and indices of the
    batches."""
    rows = 4 * size.ids * layout.dim * 4
    return (
        size.tables * table_bytes(capacity_for(size.rows), BUCKET_CAPACITY, layout)
        + rows
        + size.batches * size.ids * 64
    )


def topic(context: Context) -> Topic:
    """One case for each dim, dtype and optimizer."""
    size = DRY if context.dry else FULL
    cases = []
    for dim in size.dims:
        for dtype in size.dtypes:
            for kind in OptimizerKind:
                layout = RowLayout(dim, dtype, kind)

                def run(deadline: float, layout: RowLayout = layout) -> Measured:
                    return _measure(context, size, layout)

                name = f"{NAMES[kind]}, {_dtype_name(dtype)} rows of {dim}"
                cases.append(Case(name, run, 5, _memory_bytes(size, layout)))
    return Topic(
        name="kernels",
        title="Row gathers and fused update, as a share of the copy bandwidth",
        setup=(
            f"{size.tables} tables of {size.rows:,} rows, {size.ids:,} ids a step, uniform or from a power law with "
            f"exponent 1.05, {size.batches} batches in rotation; the kernels alone, after dedup and find. Gather takes "
            "rows out of tables, expand those that other ranks have sent, in the tables' dtype. Bytes: every "
            "distinct row read once (by the update read and written, with its optimizer state), every row of the "
            "result written, every gradient read, and the indices."
        ),
        check=(
            f"Gathered rows equal those in the table bit for bit; {CHECKED_ROWS:,} updated rows and their states equal "
            f"the formulas in float64 within {CHECK_RTOL[torch.float32]:g}, bfloat16 rows within "
            f"{CHECK_RTOL[torch.bfloat16]:.1g}."
        ),
        cases=cases,
    )
