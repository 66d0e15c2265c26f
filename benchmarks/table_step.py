"""A training step of one table beside fbgemm's table-batched embedding on the CPU: lookup, backward, update.

fbgemm's table is an array: an id is a row number, and there is nothing to find. Both get the same ids and gradients,
start from the same rows, and hold every id before the first step that counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    OptimType,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from figures import CheckError, Figure, Findings, Target
from host import MemoryCosts
from reference import FBGEMM_MILLISECONDS, REASON, backward_milliseconds, forward_milliseconds
from timing import Contender, Laps, interleaved, milliseconds, ratio
from workload import INITIAL_BOUND, LEARNING_RATE, DynamicTable, PowerLaw, mean_unique, roomy_capacity

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["FULL", "QUICK", "Size", "measure"]

#: fbgemm's own accumulators start from zero too; the same eps on both sides.
EPS = 1e-8
#: The gradients of an id that occurs thousands of times are summed in another order, which in float32 costs about
#: sqrt(10,000) * 2**-24 relative, in each of the checked steps.
CHECK_RTOL = 1e-4
CHECK_ATOL = 1e-5
CHECK_STEPS = 3
#: How many times faster than fbgemm's the step is to be, and how much of fbgemm's time the forward may take, although
#: it has to find what fbgemm is told.
STEP_TARGET, FORWARD_TARGET = 4.0, 1.0
#: Batches that the rounds take turns with: enough that no batch finds the rows of the one before it in a small cache.
BATCHES = 16

#: What absent ids read as in evaluation, their share of the ids, and how much longer an evaluation with an initializer
#: may take if there are none.
ZEROS_NAME = "zeros"
EVALUATION_INITIALIZERS = {
    ZEROS_NAME: None,
    "uniform": DynamicEmbInitializerArgs(lower=-INITIAL_BOUND, upper=INITIAL_BOUND),
    "normal": DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL),
}
ABSENT_PERCENT = (0, 1, 10)
EVALUATION_TARGET = 1.1

FBGEMM_OPTIMIZERS = {
    OptimizerKind.SGD: OptimType.EXACT_SGD,
    OptimizerKind.ROWWISE_ADAGRAD: OptimType.EXACT_ROWWISE_ADAGRAD,
}
NAMES = {
    OptimizerKind.ROWWISE_ADAGRAD: "row-wise Adagrad",
    OptimizerKind.SGD: "SGD",
    OptimizerKind.ADAM: "Adam",
}


@dataclass(frozen=True)
class Size:
    """How much is measured: rows and columns of the table, ids of a step, rounds, threads."""

    rows: int
    dim: int
    ids: int
    rounds: int
    warm_up: int
    threads: int = 2


FULL = Size(rows=1_000_000, dim=64, ids=65_536, rounds=40, warm_up=6)
QUICK = Size(rows=100_000, dim=64, ids=16_384, rounds=8, warm_up=3)


def _fbgemm_table(size: Size, kind: OptimizerKind) -> SplitTableBatchedEmbeddingBagsCodegen:
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(size.rows, size.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=FBGEMM_OPTIMIZERS[kind],
        learning_rate=LEARNING_RATE,
        eps=EPS,
        pooling_mode=PoolingMode.NONE,
    )


def _step(
    forward: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor], gradient: torch.Tensor
) -> Contender:
    def step(index: int) -> Laps:
        start = time.perf_counter()
        rows = forward(batches[index % len(batches)])
        middle = time.perf_counter()
        rows.backward(gradient)
        return {"forward": middle - start, "backward": time.perf_counter() - middle}

    return step


def _check(ours: DynamicTable, forwards: list[Callable], batches: list[torch.Tensor], gradient: torch.Tensor) -> None:
    """Trains both sides on the same steps and compares what comes out, the first time bit for bit."""
    for index, batch in enumerate(batches[:CHECK_STEPS]):
        mine, theirs = (forward(batch) for forward in forwards)
        same = torch.equal(mine, theirs) if index == 0 else torch.allclose(mine, theirs, CHECK_RTOL, CHECK_ATOL)
        if not same:
            difference = (mine - theirs).abs().max().item()
            raise CheckError(f"rows of step {index} differ from fbgemm's by up to {difference:g}")
        mine.backward(gradient)
        theirs.backward(gradient)
    if evicted := ours.group.counters()[0].evicted:
        raise CheckError(f"{evicted} rows were evicted from a table that should hold all ids")


def _measure_optimizer(size: Size, kind: OptimizerKind, law: PowerLaw, costs: MemoryCosts) -> tuple[list[Figure], dict]:
    batches = [law.draw(size.ids) for _ in range(BATCHES)]
    gradient = torch.randn(size.ids, size.dim, generator=torch.Generator().manual_seed(1))
    ours = DynamicTable(size.dim, roomy_capacity(size.rows), OptimizerConfig(kind, LEARNING_RATE, EPS))
    ours.fill(law.every_id(), size.ids)
    contenders = {"ours": _step(ours.train, batches, gradient)}
    if kind in FBGEMM_OPTIMIZERS:
        table = _fbgemm_table(size, kind)
        table.split_embedding_weights()[0].copy_(ours.read(torch.arange(size.rows)))
        offsets = torch.arange(size.ids + 1)

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            return table(ids, offsets)

        _check(ours, [ours.train, look_up], batches, gradient)
        contenders["fbgemm"] = _step(look_up, batches, gradient)
    laps = interleaved(contenders, size.rounds, size.warm_up)
    series = {
        f"{NAMES[kind]}, {side}, {phase}, ms": [1e3 * lap[phase] for lap in side_laps]
        for side, side_laps in laps.items()
        for phase in ("forward", "backward")
    }
    return _figures(size, kind, laps, mean_unique(batches), costs), series


def _figures(
    size: Size, kind: OptimizerKind, laps: dict[str, list[Laps]], unique: float, costs: MemoryCosts
) -> list[Figure]:
    name, row_bytes = NAMES[kind], size.dim * 4
    layout = DynamicTable(size.dim, 1, OptimizerConfig(kind)).group.storage.layout
    state_bytes = layout.row_bytes - row_bytes
    forward = 1e3 * costs.forward_seconds(size.ids, unique, row_bytes)
    backward = 1e3 * costs.backward_seconds(size.ids, unique, row_bytes, state_bytes)
    figures = [
        Figure(f"{name}: forward", "ms", milliseconds(laps["ours"], "forward"), forward,
               "one sort, one bucket for each distinct id, one row for each id"),
        Figure(f"{name}: backward + update", "ms", milliseconds(laps["ours"], "backward"), backward,
               "each gradient read once, each distinct row and its state read and written"),
        Figure(f"{name}: step", "ms", milliseconds(laps["ours"]), forward + backward, "sum of both"),
    ]  # fmt: skip
    if "fbgemm" in laps:
        fbgemm = FBGEMM_MILLISECONDS[kind] * size.ids / FULL.ids
        known = forward_milliseconds(size.ids, unique) + backward_milliseconds(size.ids, unique)
        figures += [
            Figure(f"{name}: fbgemm's forward", "ms", milliseconds(laps["fbgemm"], "forward")),
            Figure(f"{name}: fbgemm's backward + update", "ms", milliseconds(laps["fbgemm"], "backward")),
            Figure(f"{name}: fbgemm's step", "ms", milliseconds(laps["fbgemm"]), fbgemm, REASON),
            Figure(f"{name}: fbgemm's time / ours", "×", ratio(laps["fbgemm"], laps["ours"]), fbgemm / known,
                   f"{fbgemm:.0f} ms and {known:.0f} ms, {REASON}", Target(STEP_TARGET, at_least=True)),
            Figure(f"{name}: forward, ours / fbgemm's", "×", ratio(laps["ours"], laps["fbgemm"], "forward"),
                   target=Target(FORWARD_TARGET, at_least=False)),
        ]  # fmt: skip
    return figures


def _read(table: DynamicTable, batches: list[torch.Tensor]) -> Contender:
    def read(index: int) -> Laps:
        start = time.perf_counter()
        table.read(batches[index % len(batches)])
        return {"evaluation": time.perf_counter() - start}

    return read


def _check_evaluation(tables: dict[str, DynamicTable], batch: torch.Tensor, absent: torch.Tensor) -> None:
    rows = {name: table.read(batch) for name, table in tables.items()}
    for name, table_rows in rows.items():
        if not torch.equal(table_rows[~absent], rows[ZEROS_NAME][~absent]):
            raise CheckError(f"rows in evaluation depend on the initializer for absent ids: {name}")
        if absent.any() and bool(table_rows[absent].any()) != (name != ZEROS_NAME):
            raise CheckError(f"absent ids do not read as the initializer says: {name}")


def _measure_evaluation(size: Size, law: PowerLaw) -> tuple[list[Figure], dict[str, list[float]]]:
    """Evaluation with and without an initializer for absent ids, for some shares of those."""
    optimizer, capacity = OptimizerConfig(OptimizerKind.SGD, LEARNING_RATE), roomy_capacity(size.rows)
    tables = {
        name: DynamicTable(size.dim, capacity, optimizer, eval_initializer=initializer)
        for name, initializer in EVALUATION_INITIALIZERS.items()
    }
    for table in tables.values():
        table.fill(law.every_id(), size.ids)
    figures: list[Figure] = []
    series: dict[str, list[float]] = {}
    for percent in ABSENT_PERCENT:
        absent = torch.rand(size.ids, generator=torch.Generator().manual_seed(percent)) < percent / 100
        batches = [torch.where(absent, law.draw(size.ids) + size.rows, law.draw(size.ids)) for _ in range(BATCHES)]
        _check_evaluation(tables, batches[0], absent)
        laps = interleaved({name: _read(table, batches) for name, table in tables.items()}, size.rounds, size.warm_up)
        case = f"evaluation, {percent} % of the ids absent"
        figures.append(Figure(f"{case}: zeros", "ms", milliseconds(laps[ZEROS_NAME])))
        figures += [
            Figure(f"{case}: {name} / zeros", "×", ratio(laps[name], laps[ZEROS_NAME]),
                   target=None if percent else Target(EVALUATION_TARGET, at_least=False))
            for name in tables if name != ZEROS_NAME
        ]  # fmt: skip
        series |= {f"{case}, {name}, ms": [1e3 * lap["evaluation"] for lap in laps[name]] for name in tables}
    return figures, series


def measure(size: Size) -> Findings:
    """Measures every optimizer, of which fbgemm has no Adam on the CPU, and evaluation.

    Raises:
        CheckError: the two sides do not give the same rows.
    """
    torch.set_num_threads(size.threads)
    costs, law = MemoryCosts.measured(), PowerLaw(size.rows)
    figures: list[Figure] = []
    series: dict[str, list[float]] = {}
    for kind in NAMES:
        more_figures, more_series = _measure_optimizer(size, kind, law, costs)
        figures += more_figures
        series |= more_series
    more_figures, more_series = _measure_evaluation(size, law)
    figures += more_figures
    series |= more_series
    return Findings(
        name="table_step",
        title="A training step of one table, beside fbgemm's table-batched embedding",
        setup=(
            f"{size.threads} threads, dim {size.dim}, {size.ids:,} ids a step from a power law over {size.rows:,} ids, "
            f"all of them in the table unless said; all sides in turn, {size.rounds} rounds after {size.warm_up}."
        ),
        check=(
            f"Rows of the first step equal bit for bit, of the {CHECK_STEPS - 1} after it within {CHECK_RTOL:g}; "
            "nothing evicted. In evaluation absent ids alone read as the initializer says."
        ),
        figures=figures,
        series=series,
    )
