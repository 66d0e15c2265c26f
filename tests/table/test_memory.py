"""What a table takes from the machine, measured by the kernel of the operating system, not by our own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig
from tests import tolerances
from tests.distributed import run_on_ranks
from tests.table.groups import config, group_of

ROWS, DIM = 2**18, 64
BATCH = 2**14
STATUS = Path("/proc/self/status")


def memory_bytes(name: str) -> int:
    """``VmRSS``, which is resident now, or ``VmHWM``, the most that has been so far.

    Not ``VmPeak``, the most that was ever mapped: a thread that allocates for the first time gets an arena of its own,
    which maps 128 MiB without writing to them, and the process has threads that we do not start.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def fill_table(rank: int, world_size: int, init_rows: int) -> dict[str, int]:
    """What filling a table has added to the process's memory, by kind, and what its slots need."""
    adagrad = OptimizerConfig(kind=OptimizerKind.ADAGRAD, learning_rate=0.1)
    options = {"dim": DIM, "bucket_capacity": 128, "optimizer": adagrad, "max_load_factor": 0.5}
    small = group_of(config(capacity=2 * BATCH, **options))
    keys, tables = torch.arange(ROWS), torch.zeros(BATCH, dtype=torch.int32)
    # Whatever memory a batch needs for itself is taken before measuring begins.
    rows, lookup = small.train_lookup(keys[:BATCH], tables)
    small.apply_gradients(lookup, rows)
    del small, rows, lookup
    before = memory_bytes("VmRSS")
    group = group_of(config(capacity=2 * ROWS, init_capacity=init_rows, **options))
    for batch in keys.split(BATCH):
        rows, lookup = group.train_lookup(batch, tables)
        group.apply_gradients(lookup, rows)
        del rows, lookup
    assert group.counters()[0].size == ROWS
    assert group.storage.geometries[0].slots == 2 * ROWS
    # Pages that no key has come to are not resident yet: write to all of them.
    for chunk in group.storage.chunks[0]:
        for array in (chunk.keys, chunk.scores, chunk.rows):
            array[::4] += 0
    return {name: memory_bytes(name) - before for name in ("VmRSS", "VmHWM")}


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
@pytest.mark.parametrize("init_rows", [2**12, 2 * ROWS])
def test_peak_memory(init_rows: int) -> None:
    """Growing takes no more than being made at full size: nothing is copied aside."""
    (added,) = run_on_ranks(1, fill_table, init_rows)
    needed = 2 * ROWS * (17 + 2 * DIM * 4)
    limit = tolerances.PEAK_MEMORY_FACTOR * needed
    assert added["VmRSS"] >= needed, "the measurement sees the table"
    assert added["VmHWM"] <= limit
