"""Optimizer steps on the Triton engine: the same bits as the CPU engine, but for row-wise Adagrad's mean of squares."""

from __future__ import annotations

from typing import Optional

import numpy as np
import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.steps.cpu import advance_steps
from dynamicemb.kernels.update import HyperparameterColumn, WeightDecayMode
from dynamicemb.kernels.update.triton import begin_update
from tests.kernels.group_state import Twins, on_device
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS

TABLES = 3
#: So far. Table 0 has no weight decay; the steps reach the end of Adam's bias correction.
STEPS = torch.tensor([0, 9, 99_999])


def hyperparameters() -> torch.Tensor:
    numbers = torch.tensor([0.1, 1e-8, 0.9, 0.999, 0.01], dtype=torch.float64).repeat(TABLES, 1)
    numbers[:, HyperparameterColumn.LEARNING_RATE] = torch.tensor([0.1, 0.01, 0.5], dtype=torch.float64)
    numbers[0, HyperparameterColumn.WEIGHT_DECAY] = 0.0
    return numbers


def run(
    layout: RowLayout,
    gradient_dtype: torch.dtype,
    size: int = 60,
    steps: int = 2,
    mode: WeightDecayMode = WeightDecayMode.DECOUPLE,
) -> None:
    """Steps over keys with duplicates, of which some were refused."""
    pair = Twins([TableGeometry.create(24, 24, 8)] * TABLES, layout)
    generator = torch.Generator().manual_seed(size)
    for step in range(steps):
        keys = torch.randint(0, 25, (size,), generator=generator)
        tables = torch.randint(0, TABLES, (size,), generator=generator, dtype=torch.int32)
        keys[: size // 3], tables[: size // 3] = 1, 1
        batch, _ = pair.train(keys, tables, torch.tensor([step]))
        gradients = torch.randn(size, layout.dim, generator=generator).to(gradient_dtype)
        pair.update(batch, gradients, hyperparameters(), STEPS + step, mode)


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rules_and_row_dtypes(optimizer: OptimizerKind, dtype: torch.dtype) -> None:
    run(RowLayout(12, dtype, optimizer), torch.float32)


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
@pytest.mark.parametrize("mode", [WeightDecayMode.NONE, WeightDecayMode.L2])
def test_weight_decay_modes(optimizer: OptimizerKind, mode: WeightDecayMode) -> None:
    run(RowLayout(12, torch.float32, optimizer), torch.float32, mode=mode)


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
@pytest.mark.parametrize("gradient_dtype", [torch.float16, torch.bfloat16])
def test_gradient_dtypes(optimizer: OptimizerKind, gradient_dtype: torch.dtype) -> None:
    run(RowLayout(4, gradient_dtype, optimizer), gradient_dtype)


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
@pytest.mark.parametrize("dim", [20, 128, 1024])
def test_widths(optimizer: OptimizerKind, dim: int) -> None:
    run(RowLayout(dim, torch.float32, optimizer), torch.float32, size=15, steps=1)


def test_refused_keys_take_no_update() -> None:
    layout = RowLayout(4, torch.float32, OptimizerKind.SGD)
    pair = Twins([TableGeometry.create(8, 8, 8)], layout)
    keys, tables = torch.arange(30), torch.zeros(30, dtype=torch.int32)
    batch, _ = pair.train(keys, tables, torch.tensor([1]))
    assert (batch.cpu_slots < 0).sum() == 22
    pair.update(batch, torch.ones(30, 4), hyperparameters()[:1], STEPS[:1].clone())


def test_an_empty_batch() -> None:
    pair = Twins([TableGeometry.create(8, 8, 8)], RowLayout(4, torch.float32, OptimizerKind.ADAM))
    nothing = torch.zeros(0, dtype=torch.int64)
    batch, _ = pair.train(nothing, nothing.int(), torch.tensor([1]))
    pair.update(batch, torch.zeros(0, 4), hyperparameters()[:1], STEPS[:1].clone())


def test_a_frequent_key_is_summed_in_blocks() -> None:
    run(RowLayout(4, torch.float32, OptimizerKind.SGD), torch.float32, size=900, steps=1)


@pytest.mark.parametrize("takes_step", [None, [True, False]])
@pytest.mark.parametrize("dim", [4, 256])
def test_steps_are_counted_and_bias_corrections_are_those_of_the_cpu_engine(
    dim: int, takes_step: Optional[list[bool]]
) -> None:
    """More tables than are counted together; each has its own betas and steps, of which some are many."""
    tables, generator = 70, torch.Generator().manual_seed(1)
    numbers = torch.rand(tables, len(HyperparameterColumn), generator=generator, dtype=torch.float64)
    numbers[::3] = 1.0 - numbers[::3] * 1e-7
    steps = torch.randint(0, 1000, (tables,), generator=generator) ** torch.arange(1, 6).repeat(14)
    some = None if takes_step is None else torch.tensor(takes_step * 35)
    copies = on_device(numbers), on_device(steps), on_device(some)
    expected = np.empty((tables, 2), np.float32)
    advance_steps(steps.numpy(), np.empty(0, np.bool_) if some is None else some.numpy(), numbers.numpy(), expected)
    nothing = on_device(dedup(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), tables, 1))
    with engine("triton"):
        _, corrections = begin_update(nothing, torch.zeros(0, dim, device=DEVICE), *copies, adam=True)
    assert copies[1].tolist() == steps.tolist()
    assert corrections.cpu().numpy().tobytes() == expected.tobytes()
