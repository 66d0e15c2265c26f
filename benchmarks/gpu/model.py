"""Topic: a training step of a model of 26 features, dynamic beside static tables, with and without CUDA graphs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from figures import CheckError, Figure
from timing import ratio
from workload import LEARNING_RATE

from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig
from gpu.device import Device
from gpu.ids import IdSource
from gpu.ranking_model import DENSE_INPUTS, DensePart, Sample, Trainer
from gpu.rounds import Lap, Step, Turns, in_turns
from gpu.static import static_bytes, static_tables
from gpu.tables import LOAD, DynamicTables, dynamic_bytes
from gpu.topic import Case, Context, Measured, Topic

__all__ = ["DRY", "FULL", "Size", "topic"]

OPTIMIZER = OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD, LEARNING_RATE, 1e-8)
CHECK_STEPS = 3
#: Losses are means over a batch, so what differs is the order of float32 sums along three steps of training.
CHECK_RTOL = 1e-4
#: Of rows, which a step changes by about the learning rate.
CHECK_ATOL = 0.02 * LEARNING_RATE


@dataclass(frozen=True)
class Size:
    """How much is measured: features, rows of a table, dim, samples of a step, hidden layers, batches, rounds."""

    features: int
    rows: int
    dim: int
    batch: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    batches: int
    rounds: int
    warm_up: int


FULL = Size(26, 1_000_000, 64, 8_192, (512, 256), (1024, 1024, 512, 256), batches=12, rounds=30, warm_up=3)
DRY = Size(3, 300, 8, 40, (8,), (8,), batches=2, rounds=2, warm_up=1)


class Pair:
    """Both sides with the same rows and weights, and samples.

    Args:
        size: of everything.
        device: where it lives.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        source = IdSource(size.features, size.rows, device)
        self.samples = [_sample(size, source, device) for _ in range(size.batches)]
        dynamic = DynamicTables(size.features, size.rows, size.dim, OPTIMIZER, device)
        dynamic.insert_every(source, 1 << 20)
        static, offsets = (
            static_tables(dynamic, source, OPTIMIZER, device),
            torch.arange(size.features * size.batch + 1, device=device),
        )
        dense_part = DensePart(size.features, size.dim, size.bottom, size.top, device)
        self.dynamic = Trainer(dynamic.train, dynamic.read, dense_part, size.features)

        def look_up(batch: object) -> torch.Tensor:
            rows: torch.Tensor = static(batch.ids, offsets)  # type: ignore[attr-defined]
            return rows

        self.static = Trainer(look_up, look_up, copy.deepcopy(dense_part), size.features)

    def check(self) -> None:
        """Trains both sides on the same samples.

        Raises:
            CheckError: their losses or rows differ.
        """
        for index in range(CHECK_STEPS):
            losses, sample = [], self.samples[index % len(self.samples)]
            for trainer in (self.dynamic, self.static):
                loss = trainer.forward(sample)
                trainer.backward(loss)
                losses.append(loss.item())
            if not math.isclose(*losses, rel_tol=CHECK_RTOL):
                raise CheckError(f"losses of step {index} are {losses[0]:g} (dynamic) and {losses[1]:g} (static)")
            rows, others = (trainer.rows_now(sample) for trainer in (self.dynamic, self.static))
            if not torch.allclose(rows, others, rtol=0, atol=CHECK_ATOL):
                raise CheckError(f"rows after step {index} differ by up to {(rows - others).abs().max().item():g}")

    def eager(self, trainer: Trainer) -> Step:
        """A step that the host launches kernel by kernel."""

        def step(index: int, lap: Lap) -> None:
            loss = trainer.forward(self.samples[index % len(self.samples)])
            lap("forward")
            trainer.backward(loss)
            lap("backward")

        return step

    def replayed(self, trainer: Trainer, device: Device) -> Step:
        """A step that the host launches as one graph, after the copy of a sample to where the graph reads it.

        Raises:
            NeedsGpuError: on the host.
            CheckError: the graph computes another loss than the tables and weights of the moment make, or changes no
                row.
        """
        held = self.samples[0].clone()
        losses: list[torch.Tensor] = []

        def whole_step() -> None:
            loss = trainer.forward(held)
            trainer.backward(loss)
            losses[:] = [loss.detach()]

        replay = device.capture(whole_step)
        for sample in self.samples:
            expected, rows = trainer.loss_now(sample), trainer.rows_now(sample)
            held.copy_from(sample)
            replay()
            device.synchronize()
            if not math.isclose(losses[0].item(), expected, rel_tol=CHECK_RTOL):
                raise CheckError(f"the loss of a replayed step is {losses[0].item():g} instead of {expected:g}")
            if torch.equal(trainer.rows_now(sample), rows):
                raise CheckError("a replayed step changes no row")

        def step(index: int, lap: Lap) -> None:
            held.copy_from(self.samples[index % len(self.samples)])
            replay()
            lap("step")

        return step


def _sample(size: Size, source: IdSource, device: torch.device) -> Sample:
    generator = torch.Generator(device).manual_seed(source.universe)
    dense = torch.rand(size.batch, DENSE_INPUTS, generator=generator, device=device)
    batch = source.power_law(size.batch)
    # Something to learn: a label that follows from an input.
    return Sample(dense, batch, (dense[:, 0] > 0.5).float())


def _figures(context: Context, turns: Turns, names: dict[str, str]) -> Measured:
    """Times by phase and in all, for contenders by their label."""
    measured = Measured()
    for side, label in names.items():
        laps = turns.laps[side]
        phases = list(laps[0]) if len(laps[0]) > 1 else []
        for phase in phases:
            measured.figures.append(context.time_figure(f"{label}, {phase}", [lap[phase] for lap in laps]))
        steps = [sum(lap.values()) for lap in laps]
        measured.figures.append(context.time_figure(f"{label}, step", steps))
        measured.figures.append(context.time_figure(f"{label}, host's time to issue a step", turns.issue_seconds[side]))
        measured.series[f"{label}, s"] = steps
    return measured


def _eager(context: Context, size: Size, deadline: float) -> Measured:
    pair = Pair(size, context.torch_device)
    pair.check()
    contenders = {"dynamic": pair.eager(pair.dynamic), "static": pair.eager(pair.static)}
    turns = in_turns(context.device, contenders, size.rounds, size.warm_up, deadline)
    measured = _figures(context, turns, {"dynamic": "eager, dynamic", "static": "eager, TBE"})
    quotient = ratio(turns.laps["dynamic"], turns.laps["static"])
    measured.figures.append(Figure("eager, dynamic / TBE", "×", quotient))
    return measured


def _graph(context: Context, size: Size, deadline: float) -> Measured:
    """The dynamic side alone: what a graph saves, whether or not the static side can be captured."""
    pair = Pair(size, context.torch_device)
    contenders = {
        "graph": pair.replayed(pair.dynamic, context.device),
        "eager": pair.eager(pair.dynamic),
    }
    turns = in_turns(context.device, contenders, size.rounds, size.warm_up, deadline)
    measured = _figures(context, turns, {"graph": "CUDA graph, dynamic"})
    quotient = ratio(turns.laps["graph"], turns.laps["eager"])
    measured.figures.append(Figure("dynamic, CUDA graph / eager", "×", quotient))
    return measured


def _graphs(context: Context, size: Size, deadline: float) -> Measured:
    pair = Pair(size, context.torch_device)
    contenders = {
        "dynamic": pair.replayed(pair.dynamic, context.device),
        "static": pair.replayed(pair.static, context.device),
    }
    turns = in_turns(context.device, contenders, size.rounds, size.warm_up, deadline)
    measured = _figures(context, turns, {"static": "CUDA graph, TBE"})
    quotient = ratio(turns.laps["dynamic"], turns.laps["static"])
    measured.figures.append(Figure("CUDA graph, dynamic / TBE", "×", quotient))
    return measured


def _through_torchrec(context: Context, size: Size, deadline: float) -> Measured:
    # Not at the top: a run without torchrec measures the rest.
    from gpu.sharded_model import measure

    turns = measure(context.device, size, deadline)
    measured = _figures(
        context, turns, {"dynamic": "DistributedModelParallel, dynamic", "static": "DistributedModelParallel, static"}
    )
    quotient = ratio(turns.laps["dynamic"], turns.laps["static"])
    measured.figures.append(Figure("DistributedModelParallel, dynamic / static", "×", quotient))
    return measured


def _memory_bytes(size: Size) -> int:
    kind = OPTIMIZER.kind
    tables = dynamic_bytes(size.features, size.rows, size.dim, kind) + static_bytes(
        size.features, size.rows, size.dim, kind
    )
    widest = sum((*size.bottom, *size.top)) + (size.features + 1) ** 2 + 4 * size.features * size.dim
    return tables + 3 * size.batch * widest * 4 + (1 << 20) * size.dim * 4


def topic(context: Context) -> Topic:
    """What needs least comes first, so that a graph that cannot be captured spoils nothing."""
    size = DRY if context.dry else FULL
    parts: list[tuple[str, Callable[[Context, Size, float], Measured]]] = [
        ("eager", _eager),
        ("DistributedModelParallel", _through_torchrec),
        ("CUDA graph, dynamic", _graph),
        ("CUDA graphs, both sides", _graphs),
    ]
    cases = []
    for name, part in parts:

        def run(deadline: float, part: Callable[[Context, Size, float], Measured] = part) -> Measured:
            return part(context, size, deadline)

        cases.append(Case(name, run, 15, _memory_bytes(size)))
    return Topic(
        name="model",
        title=f"A training step of a model of {size.features} features",
        setup=(
            f"{size.features} tables of {size.rows:,} rows, dim {size.dim}, float32, row-wise Adagrad, dynamic ones "
            f"filled to {LOAD:.0%}; {size.batch:,} samples a step with one id for each feature from a power law with "
            f"exponent 1.05; dense layers {size.bottom} and {size.top} with pairwise products, SGD; "
            f"{size.batches} batches in rotation, both sides in turn, {size.rounds} rounds after {size.warm_up}. "
            "Static: SplitTableBatchedEmbeddingBagsCodegen without pooling. CUDA graph: lookup, dense forward, loss, "
            "backward and updates in one graph; the copy of a batch to where the graph reads it is part of the step. "
            "DistributedModelParallel: one rank, TorchRec's collection and its own sharder beside this package's."
        ),
        check=(
            f"Losses of {CHECK_STEPS} steps equal within {CHECK_RTOL:g} on both sides, rows after each within "
            f"{CHECK_ATOL:g}; a replayed graph's loss equals "
            "that of an evaluation just before it, and rows have changed after it. Through DistributedModelParallel: "
            "the dynamic tables hold every id."
        ),
        cases=cases,
    )
