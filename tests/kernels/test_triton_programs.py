"""Kernels whose programs share the tiles of a batch: any number of programs gives the bytes of the CPU engine."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import pytest
import torch

from dynamicemb.kernels.launch import Launch, intercepted
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.update import HyperparameterColumn
from tests.kernels.first_rows import initial_rows
from tests.kernels.group_state import Twins, both_engines
from tests.kernels.triton_host import INTERPRETED, MARKS

pytestmark = MARKS

SHARING = {
    "_find_kernel", "_insert_kernel", "_fill_kernel", "_fill_missing_kernel", "_update_kernel", "_sum_rows_kernel",
}  # fmt: skip
#: Positions of a batch, nearly all of them distinct. Tiles have 248 entries at most, so there are more than three.
BATCH = 800


def shares_tiles(launch: Launch) -> bool:
    return "tl.num_programs(" in inspect.getsource(launch.kernel.fn)


@contextmanager
def sharing(change: Callable[[Launch], Launch]) -> Iterator[list[Launch]]:
    """Runs all launches inside the block, those whose programs share tiles as ``change`` says; collects these."""
    launches: list[Launch] = []

    def run(launch: Launch) -> None:
        if shares_tiles(launch):
            launches.append(launch := change(launch))
        launch.run()

    with intercepted(run):
        yield launches


def train_on_both() -> None:
    """Find, insert and fill, sums and an update, and the rows of missing keys."""
    layout = RowLayout(4, torch.float32, OptimizerKind.SGD)
    pair = Twins([TableGeometry.create(512, 512, 8)], layout)
    generator = torch.Generator().manual_seed(0)
    keys, tables = torch.randint(0, 10_000, (BATCH,), generator=generator), torch.zeros(BATCH, dtype=torch.int32)
    batch, _ = pair.train(keys, tables, torch.tensor([1]))
    gradients = torch.randn(BATCH, layout.dim, generator=generator)
    expected, actual = both_engines(segment_sum, gradients, batch.cpu)
    assert torch.equal(actual.cpu(), expected)
    hyperparameters = torch.full((1, len(HyperparameterColumn)), 0.5, dtype=torch.float64)
    pair.update(batch, gradients, hyperparameters, torch.tensor([1]))
    expected, actual = both_engines(initial_rows, keys, tables, pair.initializers, layout.dim, torch.float32)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("programs", [1, None, 50])
def test_any_number_of_programs_gives_the_same_table(programs: Optional[int]) -> None:
    """None: as many as the launchers ask for."""
    with sharing(lambda launch: launch if programs is None else dataclasses.replace(launch, programs=programs)) as seen:
        train_on_both()
    assert {launch.kernel.__name__ for launch in seen} == SHARING
    if INTERPRETED and programs is None:
        assert {launch.programs for launch in seen} == {3}
