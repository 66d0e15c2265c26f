"""A dump and a load of a table larger than the limit stay below it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynamicemb import DynamicEmbDump, DynamicEmbLoad, incremental_dump
from dynamicemb.shard import table_statistics
from dynamicemb.shard.tables import dynamic_tables
from tests.checkpoint.models import model
from tests.distributed import run_on_ranks
from tests.shard.models import one_sample

LIMIT = 256 << 20
ROWS, DIM = 330_000, 128
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured as Linux does")


def _status(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _peak(action: Callable[[], None]) -> int:
    """Bytes that ``action`` takes at its peak, above what there is before or what it leaves, whichever is more."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - max(before, _status("VmRSS"))


def _peaks(rank: int, world_size: int, folder: str) -> dict[str, int]:
    options = {"optimizer": "adagrad", "tables": 1, "dim": DIM, "capacity": 2 * ROWS, "bucket_capacity": 128}
    first = model(**options)
    for ids in torch.arange(ROWS).split(30_000):
        first(one_sample({"t0": ids}))
    table = dynamic_tables(first)[0]
    num_bytes = ROWS * table.group.storage.layout.row_bytes
    assert table_statistics(first)["t0"].size == ROWS and num_bytes > 1.2 * LIMIT, "a copy of it would not pass"
    DynamicEmbDump(f"{folder}/warm", first, {"model.embeddings": ["t0"]})  # compiles, and starts threads
    peaks = {"dump": _peak(lambda: DynamicEmbDump(f"{folder}/full", first, optim=True))}
    peaks["delta of everything"] = _peak(lambda: incremental_dump(f"{folder}/delta", first, 0, optim=True))
    size = table.group.storage.num_bytes
    second = model(**options)
    peaks["load"] = _peak(lambda: DynamicEmbLoad(f"{folder}/full", second, optim=True))
    assert dynamic_tables(second)[0].group.storage.num_bytes == size
    return peaks


@pytest.mark.slow
def test_memory_beside_the_table_is_bounded(tmp_path: Path) -> None:
    [peaks] = run_on_ranks(1, _peaks, str(tmp_path))
    assert all(peak < LIMIT for peak in peaks.values()), {name: peak >> 20 for name, peak in peaks.items()}
