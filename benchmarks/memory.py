"""Peak memory of a table beside what its rows and metadata take, allocated at once and grown by doubling.

Each table lives in a fresh process and trains until every slot has been written. The peak is the kernel's own record
(``VmHWM``): ``getrusage`` starts at the size of the process that started this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from figures import CheckError, Figure, Findings, Spread, Target
from processes import in_fresh_process
from workload import LEARNING_RATE, DynamicTable

from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["FULL", "QUICK", "Size", "measure"]

MIB = 2**20
OPTIMIZER = OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD, LEARNING_RATE)
#: Ids that train a table, for each of its slots: every bucket has then been full for a while.
IDS_PER_SLOT = 1.5


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        capacity: rows of the table.
        dim: columns.
        ids: of a step.
        doublings: from the first size of the growing table to its last.
    """

    capacity: int
    dim: int
    ids: int
    doublings: int = 3


FULL = Size(capacity=2**21, dim=64, ids=4_096)
QUICK = Size(capacity=2**18, dim=64, ids=2_048, doublings=1)


@dataclass(frozen=True)
class Footprint:
    """What one table came to.

    Attributes:
        slots: at the end.
        row_bytes: of a row with its optimizer state.
        padding_bytes: of those, what alignment costs.
        table_bytes: rows and metadata, as allocated at the end.
        metadata_bytes: of those, what is not rows.
        directory_bytes: of the tensors that say where everything is, besides those.
        size: rows stored at the end.
        doublings: that took place.
        peak_by_step: growth of the process's peak after each step, over what the table took at that time.
        peak_bytes: growth of the process's peak at the end.
    """

    slots: int
    row_bytes: int
    padding_bytes: int
    table_bytes: int
    metadata_bytes: int
    directory_bytes: int
    size: int
    doublings: int
    peak_by_step: list[float]
    peak_bytes: int


def _status_bytes(field: str) -> int:
    """A size from /proc/self/status: ``VmRSS``, resident now, or ``VmHWM``, the most it has been."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def _train(table: DynamicTable, ids: torch.Tensor) -> None:
    rows = table.train(ids)
    rows.backward(torch.ones_like(rows))


def _footprint(size: Size, init_capacity: int) -> Footprint:
    torch.set_num_threads(1)
    warm_up = DynamicTable(size.dim, 4 * size.ids, OPTIMIZER, init_capacity=2 * size.ids)
    for first in range(4):
        _train(warm_up, torch.arange(first * size.ids, (first + 1) * size.ids))
    del warm_up
    resident = _status_bytes("VmRSS")

    table = DynamicTable(size.dim, size.capacity, OPTIMIZER, init_capacity=init_capacity)
    storage = table.group.storage
    peak_by_step = []
    # Made step by step: all of them together would take a third of the smallest table.
    for first in range(0, int(IDS_PER_SLOT * size.capacity), size.ids):
        _train(table, torch.arange(first, first + size.ids))
        peak_by_step.append((_status_bytes("VmHWM") - resident) / storage.num_bytes)
    view, layout = storage.view, storage.layout
    slots = sum(chunk.digests.numel() for chunk in storage.chunks[0])
    rows_bytes = sum(chunk.rows.nbytes for chunk in storage.chunks[0])
    return Footprint(
        slots=slots,
        row_bytes=layout.row_bytes,
        padding_bytes=layout.row_bytes - 4 * (layout.dim + layout.state_width),
        table_bytes=storage.num_bytes,
        metadata_bytes=storage.num_bytes - rows_bytes,
        directory_bytes=view.addresses.nbytes + view.geometry.nbytes,
        size=table.group.counters()[0].size,
        doublings=len(storage.chunks[0]) - 1,
        peak_by_step=peak_by_step,
        peak_bytes=_status_bytes("VmHWM") - resident,
    )


def _check(name: str, footprint: Footprint, size: Size, doublings: int) -> None:
    if footprint.doublings != doublings or footprint.slots < size.capacity:
        raise CheckError(f"{name}: {footprint.slots} slots after {footprint.doublings} doublings")
    if footprint.size < 0.99 * footprint.slots:
        raise CheckError(f"{name}: {footprint.size} of {footprint.slots} slots hold a row, too few to count as full")


def measure(size: Size) -> Findings:
    """Measures one table of each kind.

    Raises:
        CheckError: a table did not fill or grow as it should have.
    """
    figures: list[Figure] = []
    series: dict[str, list[float]] = {}
    for name, doublings in (("allocated at once", 0), ("grown", size.doublings)):
        footprint = in_fresh_process(_footprint, size, size.capacity >> doublings)
        _check(name, footprint, size, doublings)
        step_bytes = 3 * size.ids * footprint.row_bytes
        figures += [
            Figure(f"{name}: metadata per slot", "bytes",
                   Spread.exact(footprint.metadata_bytes / footprint.slots), METADATA_BYTES_PER_SLOT,
                   "digest 1, key 8, score 8", Target(17.0, at_least=False)),
            Figure(f"{name}: directory of the table", "bytes", Spread.exact(footprint.directory_bytes), None,
                   "whatever its size"),
            Figure(f"{name}: padding per slot", "bytes", Spread.exact(footprint.padding_bytes), None,
                   "inside the row, for 16-byte alignment of the optimizer state"),
            Figure(f"{name}: rows + metadata", "MiB", Spread.exact(round(footprint.table_bytes / MIB, 1)),
                   round(footprint.slots * (footprint.row_bytes + METADATA_BYTES_PER_SLOT) / MIB, 1),
                   f"{footprint.slots:,} slots"),
            Figure(f"{name}: peak / (rows + metadata), full", "×",
                   Spread.exact(footprint.peak_bytes / footprint.table_bytes),
                   1 + step_bytes / footprint.table_bytes, "and the rows, gradients and indices of one step",
                   Target(1.2, at_least=False)),
        ]  # fmt: skip
        if doublings:
            figures.append(
                Figure(f"{name}: peak / (rows + metadata), worst step", "×", Spread.exact(max(footprint.peak_by_step)),
                       1 + step_bytes / (footprint.table_bytes >> doublings), "same, in the smallest table",
                       Target(1.2, at_least=False))
            )  # fmt: skip
        series[f"{name}, peak / (rows + metadata) by step"] = footprint.peak_by_step
    return Findings(
        name="memory",
        title="Memory of a table",
        setup=(
            f"Dim {size.dim}, row-wise Adagrad, {size.capacity:,} rows, {size.ids:,} ids a step, "
            f"{IDS_PER_SLOT:g} ids trained for each slot; a fresh process for each table, growth of its peak resident "
            "size over what it had with the libraries loaded and the kernels run."
        ),
        check="At least 99 % of the slots hold a row at the end; the growing table doubled as often as it should.",
        figures=figures,
        series=series,
    )
