"""Dynamic tables trained beside TorchRec's CUDA tables, through ``DistributedModelParallel`` on NCCL: they stay alike.

Two collections with several tables each, index deduplication on and off, empty features and batches without samples:
:mod:`tests.shard.parity`, which says what is compared. One rank, because each rank of NCCL needs a GPU of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("fbgemm_gpu")
pytest.importorskip("torchrec")

from tests import tolerances
from tests.distributed import run_on_ranks
from tests.gpu.scale import FULL, TOY, Scale
from tests.shard import parity

assert parity.STEPS >= 20
#: The only one at toy size; tests/shard has all of them on the CPU.
TOY_OPTIMIZER = "rowwise_adagrad"


def run_all(rank: int, world_size: int, optimizers: list[str]) -> dict[str, dict[str, Any]]:
    """All in one process: NCCL and the imports take longer than the runs."""
    return {optimizer: parity.run(rank, world_size, optimizer) for optimizer in optimizers}


@functools.cache
def results(scale: Scale) -> dict[str, dict[str, Any]]:
    backend, optimizers = ("nccl", list(parity.OPTIMIZERS)) if scale.full else ("gloo", [TOY_OPTIMIZER])
    return run_on_ranks(1, run_all, optimizers, backend=backend)[0]


@pytest.mark.parametrize(
    ("optimizer", "scale"),
    [
        pytest.param(TOY_OPTIMIZER, TOY, id="toy"),
        *(
            pytest.param(optimizer, FULL, id=f"gpu-{optimizer}", marks=pytest.mark.gpu)
            for optimizer in parity.OPTIMIZERS
        ),
    ],
)
def test_rows_stay_those_of_torchrec(optimizer: str, scale: Scale) -> None:
    result = results(scale)[optimizer]
    assert result["forward_equal"] and result["lengths_equal"]
    assert max(result["errors"].values()) < tolerances.TRAINED_ROW_RTOL, result["errors"]
    assert min(result["changed"].values()) > 0.25, result["changed"]
    assert all(result["models_equal"][name] for name in parity.DYNAMIC), result["models_equal"]
