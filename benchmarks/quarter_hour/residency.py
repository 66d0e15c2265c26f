"""How many programs an update should start: as many as the GPU holds at once, or several rounds of them.

The time of the fused update on one batch, with each number of rounds in turn. With ``--launches N`` it makes no
findings, but N updates with ``--rounds`` of programs, for a profiler to look at.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from gpu import kernels
from gpu.device import CudaDevice, HostDevice
from gpu.rounds import timed
from gpu.tables import DynamicTables
from workload import LEARNING_RATE

from dynamicemb.kernels import launch
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig

from .journal import OK, append_line

__all__ = ["main"]

ROUNDS = (1, 2, 4, 8)
TURNS = 6
OPTIMIZERS = (OptimizerKind.ADAM, OptimizerKind.SGD)


class Update:
    """One batch that has been looked up, and its gradients.

    Args:
        kind: the optimizer.
        size: of the tables and the batch.
        device: where they live.
    """

    def __init__(self, kind: OptimizerKind, size: kernels.Size, device: torch.device) -> None:
        source = kernels.IdSource(size.tables, size.rows, device)
        tables = DynamicTables(size.tables, size.rows, size.dims[0], OptimizerConfig(kind, LEARNING_RATE), device)
        tables.insert_every(source, size.ids)
        batch = source.power_law(size.ids_per_table)
        rows, self._lookup = tables.group.train_lookup(batch.ids, batch.tables)
        self._group, self._gradients = tables.group, torch.rand_like(rows)

    def __call__(self, index: int) -> None:
        self._group.apply_gradients(self._lookup, self._gradients)


def _microseconds(kind: OptimizerKind, dry: bool) -> dict[str, float]:
    """Medians of the update's time by rounds, all of which take turns."""
    device = HostDevice() if dry else CudaDevice()
    update = Update(kind, kernels.DRY if dry else kernels.FULL, device.torch_device)
    seconds: dict[int, list[float]] = {rounds: [] for rounds in ROUNDS}
    for _ in range(2 if dry else TURNS):
        for rounds in ROUNDS:
            with mock.patch.object(launch, "_ROUNDS", rounds):
                seconds[rounds] += timed(device, update, samples=2 if dry else 8)
    return {f"{rounds} rounds, µs": round(1e6 * statistics.median(times), 1) for rounds, times in seconds.items()}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[kind.name.lower() for kind in OPTIMIZERS])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--launches", type=int, metavar="N")
    parser.add_argument("--rounds", type=int, default=launch._ROUNDS)
    parser.add_argument("--findings", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in options.names:
        kind, start = OptimizerKind[name.upper()], time.perf_counter()
        if options.launches is not None:
            update = Update(kind, kernels.FULL, torch.device("cuda"))
            with mock.patch.object(launch, "_ROUNDS", options.rounds):
                for index in range(options.launches):
                    update(index)
            torch.cuda.synchronize()
            continue
        figures = _microseconds(kind, options.dry_run)
        record = {"name": name, "outcome": OK, "seconds": round(time.perf_counter() - start, 2), "figures": figures}
        append_line(options.findings, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
