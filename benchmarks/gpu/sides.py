"""Both sides of the step of ten tables: dynamic and static tables with the same rows, and what they train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from figures import CheckError
from workload import LEARNING_RATE

from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig
from gpu import traffic
from gpu.ids import Batch, IdSource, count_unique
from gpu.rounds import Lap, Step
from gpu.static import static_bytes, static_tables, why_no_static
from gpu.tables import (
    BUCKET_CAPACITY,
    LOAD,
    DynamicTables,
    dynamic_bytes,
)
from gpu.traffic import Traffic

__all__ = [
    "CHECK_RTOL", "CHECK_STEPS", "DRY", "FULL", "OPTIMIZERS", "WITH_INITIALIZER", "Pair", "Size", "memory_bytes",
]  # fmt: skip

#: The dynamic side once more, evaluated with an initializer for absent ids, which static tables have no notion of.
WITH_INITIALIZER = "dynamic with an initializer"

EPS = 1e-8
#: Gradients are positive, so their sums do not cancel: both sides add up to 10,000 of them in different orders, which
#: in float32 costs about 100 * 2**-24 relative in each checked step.
CHECK_RTOL = 1e-4
CHECK_ATOL = 1e-6
CHECK_STEPS = 3
OPTIMIZERS = (OptimizerKind.SGD, OptimizerKind.ADAM)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        tables: in the group.
        rows: of a table.
        dim: columns.
        ids_per_table: of a step.
        batches: that take turns, so that none finds the rows of the one before it in the cache.
        rounds, warm_up: rounds that count, and before them.
    """

    tables: int
    rows: int
    dim: int
    ids_per_table: int
    batches: int
    rounds: int
    warm_up: int

    @property
    def ids(self) -> int:
        return self.tables * self.ids_per_table


FULL = Size(tables=10, rows=1_680_000, dim=128, ids_per_table=104_857, batches=12, rounds=40, warm_up=4)
DRY = Size(tables=2, rows=600, dim=8, ids_per_table=150, batches=3, rounds=2, warm_up=1)


class Pair:
    """Dynamic tables that hold every id, static ones with the same rows where fbgemm has the optimizer, and batches.

    Args:
        size: of everything.
        kind: the optimizer.
        device: where it lives.
    """

    def __init__(self, size: Size, kind: OptimizerKind, device: torch.device) -> None:
        optimizer = OptimizerConfig(kind, LEARNING_RATE, EPS)
        source = IdSource(size.tables, size.rows, device)
        self.batches = [source.power_law(size.ids_per_table) for _ in range(size.batches)]
        generator = torch.Generator(device).manual_seed(1)
        self.gradient = torch.rand(size.ids, size.dim, generator=generator, device=device) + 0.5
        self.unique = sum(count_unique(batch) for batch in self.batches) / size.batches
        self.dynamic = DynamicTables(size.tables, size.rows, size.dim, optimizer, device)
        self.dynamic.insert_every(source, size.ids)
        self.static: Optional[Any] = None
        if not why_no_static(kind, device):
            self.static = static_tables(self.dynamic, source, optimizer, device)
        self._offsets = torch.arange(size.ids + 1, device=device)

    def train_static(self, batch: Batch) -> torch.Tensor:
        """Rows of the static tables, whose gradient updates them."""
        assert self.static is not None
        rows: torch.Tensor = self.static(batch.ids, self._offsets)
        return rows

    def read_static(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return self.train_static(batch)

    def check(self) -> None:
        """Trains both sides on the same steps and compares what they look up, the first time bit for bit.

        Raises:
            CheckError: the rows differ, or an id lost its place.
        """
        self._check_places()
        for index in range(CHECK_STEPS + 1 if self.static is not None else 0):
            batch, last = self.batches[index % len(self.batches)], index == CHECK_STEPS
            mine = (self.dynamic.read if last else self.dynamic.train)(batch)
            theirs = (self.read_static if last else self.train_static)(batch)
            same = torch.allclose(mine, theirs, CHECK_RTOL, CHECK_ATOL) if index else torch.equal(mine, theirs)
            if not same:
                difference = (mine - theirs).abs().max().item()
                raise CheckError(f"rows of step {index} differ from fbgemm's by up to {difference:g}")
            if not last:
                mine.backward(self.gradient)
                theirs.backward(self.gradient)
            if last and not torch.equal(self.dynamic.read_with_initializer(batch), mine):
                raise CheckError("rows differ with an initializer for absent ids, of which there are none")
        self._check_places()

    def _check_places(self) -> None:
        if misplaced := self.dynamic.misplaced():
            raise CheckError(f"{misplaced} ids lost their place in tables that should hold all of them")

    def training(self) -> dict[str, Step]:
        """A step of each side, in the phases ``forward`` and ``backward``."""
        sides = {"dynamic": self.dynamic.train} | ({} if self.static is None else {"static": self.train_static})
        return {side: self._training_step(forward) for side, forward in sides.items()}

    def _training_step(self, forward: Callable[[Batch], torch.Tensor]) -> Step:
        def step(index: int, lap: Lap) -> None:
            rows = forward(self.batches[index % len(self.batches)])
            lap("forward")
            rows.backward(self.gradient)
            lap("backward")

        return step

    def evaluation(self) -> dict[str, Step]:
        """A lookup of each side that changes nothing, in one phase. Absent ids would read as zeros: a static table has
        no other answer for them either, and asks nothing of any id."""
        sides = {"dynamic": self.dynamic.read, WITH_INITIALIZER: self.dynamic.read_with_initializer}
        if self.static is not None:
            sides["static"] = self.read_static
        return {side: self._evaluation_step(read) for side, read in sides.items()}

    def _evaluation_step(self, read: Callable[[Batch], torch.Tensor]) -> Step:
        def step(index: int, lap: Lap) -> None:
            read(self.batches[index % len(self.batches)])
            lap("evaluation")

        return step

    @property
    def metadata_bytes(self) -> int:
        """Of the dynamic tables: what their keys are searched in."""
        return self.dynamic.buckets * BUCKET_CAPACITY * METADATA_BYTES_PER_SLOT

    def traffic(self, size: Size) -> dict[str, dict[str, Traffic]]:
        """What each phase of each side moves."""
        layout, unique, buckets = self.dynamic.layout, self.unique, self.dynamic.buckets
        evaluation = traffic.evaluation(size.ids, unique, layout, LOAD)
        return {
            "dynamic": {
                "forward": traffic.forward(size.ids, unique, 0, layout, size.tables, buckets, LOAD),
                "backward": traffic.backward(size.ids, unique, layout),
                "evaluation": evaluation,
            },
            WITH_INITIALIZER: {"evaluation": evaluation + traffic.fill_missing(size.ids, 0, layout)},
            "static": {
                "forward": traffic.static_forward(size.ids, unique, layout),
                "backward": traffic.static_backward(size.ids, unique, layout),
                "evaluation": traffic.static_forward(size.ids, unique, layout),
            },
        }


def memory_bytes(size: Size, kind: OptimizerKind) -> int:
    """Both sides, and the rows and gradients of a step with what the check makes of them."""
    tables = dynamic_bytes(size.tables, size.rows, size.dim, kind) + static_bytes(
        size.tables, size.rows, size.dim, kind
    )
    return tables + 12 * size.ids * size.dim * 4
