"""Optimizer steps on the CPU engine, against the documented formulas in float64 and against torch's optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.update import HyperparameterColumn, WeightDecayMode, update
from dynamicemb.table.optimizers import HYPERPARAMETERS
from tests import oracle_values, tolerances
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import distinct, int64
from tests.oracle_values import DECOUPLE, L2, NO_DECAY, Numbers

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (4, 8, 20, 64, 128, 1024)
ROUNDING = {
    torch.float32: lambda x: x.astype(np.float32),
    torch.float16: oracle_values.to_float16,
    torch.bfloat16: oracle_values.to_bfloat16,
}
#: Half a unit in the last place, relative: what rounding to the row's dtype may turn a difference in float32 into.
UNIT = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Exact in float32, so that the formulas in float64 see the same numbers.
NUMBERS = Numbers(0.0625, eps=2.0**-20, beta1=0.875, beta2=0.96875)


class Rows:
    """A table of 64 slots with random rows; slot = entry of the batch's distinct keys, or what a test says."""

    def __init__(self, dim: int, dtype: torch.dtype, kind: OptimizerKind, tables: int = 1) -> None:
        layout = RowLayout(dim, dtype, kind)
        self.memory = GroupMemory([TableGeometry.create(64, 64, 64)] * tables, layout)
        generator = torch.Generator().manual_seed(dim)
        self.slots = int64(((table * 32) << 40) + slot for table in range(tables) for slot in range(64))
        embeddings = torch.randn(len(self.slots), dim, generator=generator).to(dtype)
        states = torch.rand(len(self.slots), layout.state_width, generator=generator) + 0.125
        self.memory.write(self.slots, embeddings, states)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings and states of all slots, float64."""
        return self.memory.embeddings(self.slots).double().numpy(), self.memory.states(self.slots).double().numpy()

    def step(
        self, keys: list[int], gradients: torch.Tensor, *numbers: Numbers, slots: torch.Tensor | None = None
    ) -> None:
        """Updates with ``keys`` in table 0; ``numbers`` of each table."""
        unique = distinct(keys)
        slots = torch.arange(len(unique.keys)) if slots is None else slots
        update(self.memory.view, unique, slots, gradients, *hyperparameters(*numbers))


def hyperparameters(*tables: Numbers) -> tuple[torch.Tensor, torch.Tensor, WeightDecayMode]:
    """What an update needs to know of its tables before ``step``."""
    rows = [[t.learning_rate, t.eps, t.beta1, t.beta2, t.weight_decay] for t in tables]
    (mode,) = {table.mode for table in tables}
    return torch.tensor(rows, dtype=torch.float64), int64(table.step - 1 for table in tables), WeightDecayMode(mode)


def assert_rows_close(actual: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> None:
    rounded = ROUNDING[dtype](expected.astype(np.float32))
    atol = tolerances.OPTIMIZER_STEP_ATOL * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, rounded, rtol=UNIT[dtype], atol=atol)
    if dtype is not torch.float32:  # only ties within a float32 rounding may fall to the other side
        assert np.mean(actual != rounded) < 0.01


def test_columns_are_those_of_the_config() -> None:
    assert tuple(column.name.lower() for column in HyperparameterColumn) == HYPERPARAMETERS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("mode", WeightDecayMode)
def test_one_step_is_the_documented_formula(
    kind: OptimizerKind, dim: int, dtype: torch.dtype, mode: WeightDecayMode
) -> None:
    rows = Rows(dim, dtype, kind)
    numbers = dataclasses.replace(NUMBERS, weight_decay=0.25, step=3, mode=mode)
    weights, states = rows.values()
    keys = list(range(40))
    gradients = torch.randn(40, dim, generator=torch.Generator().manual_seed(1))
    untouched = rows.memory.row_bytes(rows.slots[40:])
    rows.step(keys, gradients, numbers)
    unique = distinct(keys)
    by_entry = gradients.double().numpy()[unique.order.numpy()]
    steps = [oracle_values.optimizer_step(kind, weights[e], states[e], by_entry[e], numbers) for e in range(40)]
    new_weights, new_states = rows.values()
    assert_rows_close(new_weights[:40], np.stack([row for row, _ in steps]), dtype)
    rtol = tolerances.OPTIMIZER_STATE_RTOL if kind != OptimizerKind.ROWWISE_ADAGRAD else tolerances.ROWWISE_STATE_RTOL
    # Adam's mean may be near zero after cancellation: absolute, in units of its terms.
    atol = tolerances.OPTIMIZER_STEP_ATOL if kind is OptimizerKind.ADAM else 0.0
    np.testing.assert_allclose(new_states[:40], np.stack([state for _, state in steps]), rtol=rtol, atol=atol)
    assert torch.equal(rows.memory.row_bytes(rows.slots[40:]), untouched)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 20, 128])
def test_duplicates_are_summed_sequentially_in_float32(dim: int, gradient_dtype: torch.dtype) -> None:
    rows = Rows(dim, torch.float32, OptimizerKind.SGD)
    generator = torch.Generator().manual_seed(2)
    keys = torch.randint(0, 12, (300,), generator=generator).tolist()
    scale = 10.0 ** torch.randint(-4, 4, (300, 1), generator=generator)
    gradients = (torch.randn(300, dim, generator=generator) * scale).to(gradient_dtype)
    expected = rows.memory.embeddings(rows.slots).numpy().copy()
    sums = np.zeros((12, dim), np.float32)
    for entry, gradient in zip(distinct(keys).inverse.tolist(), gradients.float().numpy()):
        sums[entry] += gradient
    expected[:12] -= np.float32(0.5) * sums  # exact product: one rounding, with or without a fused multiply-add
    rows.step(keys, gradients, Numbers(0.5))
    np.testing.assert_array_equal(rows.memory.embeddings(rows.slots).numpy(), expected)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_the_optimizer_runs_once_for_each_key(kind: OptimizerKind) -> None:
    apart, together = Rows(8, torch.float32, kind), Rows(8, torch.float32, kind)
    gradients = torch.tensor([[0.5] * 8, [0.25] * 8, [1.0] * 8])
    apart.step([7, 7, 7], gradients, NUMBERS)
    together.step([7], gradients.sum(0, keepdim=True), NUMBERS)
    assert torch.equal(apart.memory.row_bytes(apart.slots), together.memory.row_bytes(together.slots))


@pytest.mark.parametrize("kind", OptimizerKind)
def test_keys_without_a_slot_are_passed_over(kind: OptimizerKind) -> None:
    rows = Rows(8, torch.float32, kind)
    before = rows.memory.row_bytes(rows.slots)
    slots = int64([5, -1, 9, -1])
    rows.step([1, 2, 3, 4], torch.ones(4, 8), NUMBERS, slots=slots)
    changed = (rows.memory.row_bytes(rows.slots) != before).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [5, 9]


def test_an_empty_batch() -> None:
    rows = Rows(8, torch.float32, OptimizerKind.ADAM)
    before = rows.memory.snapshot()
    rows.step([], torch.empty(0, 8), NUMBERS)
    assert not rows.memory.changed_since(before)


@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("mode", WeightDecayMode)
def test_each_table_has_its_own_numbers_and_steps(kind: OptimizerKind, mode: WeightDecayMode) -> None:
    rows = Rows(8, torch.float32, kind, tables=3)
    tables = [Numbers(0.5, step=1), Numbers(0.25, 0.5, 0.5, 0.75, step=9), Numbers(0.125, weight_decay=0.5, step=2)]
    tables = [dataclasses.replace(numbers, mode=mode) for numbers in tables]
    weights, states = rows.values()
    unique = distinct([4, 4, 4], [0, 1, 2])
    picked = int64([3, 64 + 5, 128 + 7])
    gradients = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    update(rows.memory.view, unique, rows.slots[picked], gradients, *hyperparameters(*tables))
    new_weights, _ = rows.values()
    for table, slot in enumerate(picked.tolist()):
        gradient = gradients[table].double().numpy()
        expected, _ = oracle_values.optimizer_step(kind, weights[slot], states[slot], gradient, tables[table])
        np.testing.assert_allclose(new_weights[slot], expected, atol=2 * tolerances.OPTIMIZER_STEP_ATOL, rtol=0)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_a_long_batch_in_two_threads(kind: OptimizerKind, two_threads: None) -> None:
    def run(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        memory = GroupMemory([TableGeometry.create(8192, 8192, 256)], RowLayout(4, torch.float32, kind))
        memory.chunks[0][0].rows.zero_()
        unique = distinct([key % 6000 for key in range(20_000)])
        gradients = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(4))
        update(memory.view, unique, torch.arange(6000), gradients, *hyperparameters(NUMBERS))
        return memory.chunks[0][0].rows

    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_16_bits_round_to_nearest_even_as_in_torch(dtype: torch.dtype) -> None:
    # From a row of zeros and with learning rate 1 the new row is the rounded gradient.
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (48, 1024), generator=generator).to(torch.int32)
    exponents = torch.randint(96, 146, (48, 1024), generator=generator).to(torch.int32)  # the range of float16
    near = (bits & ~0x7F800000) | (exponents << 23)
    values = torch.cat([near[:32], bits[32:]]).view(torch.float32)
    # Ties: patterns whose lost half is exactly one half.
    lost = 13 if dtype is torch.float16 else 16
    values[:8] = ((near[:8] >> lost << lost) | (1 << (lost - 1))).view(torch.float32)
    # The borders: greatest numbers, overflow, least normal and subnormal numbers.
    borders = [65504.0, 65519.0, 65520.0, 65535.0, 65536.0, 3.3895e38, 3.3962e38, 2.0**-14, 2.0**-24, 2.0**-25, 0.0]
    borders += [2.0**-25 * 1.001, 1023.5 * 2.0**-24, 1e-40, float("inf")]
    values[8, : len(borders)] = torch.tensor(borders)
    memory = GroupMemory([TableGeometry.create(64, 64, 64)], RowLayout(1024, dtype, OptimizerKind.SGD))
    memory.chunks[0][0].rows.zero_()
    unique = distinct(list(range(48)))
    update(memory.view, unique, torch.arange(48), -values, *hyperparameters(Numbers(1.0)))
    actual, expected = memory.embeddings(torch.arange(48)), values[unique.order].to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(actual.isnan(), ~numbers)
    assert torch.equal(actual[numbers], expected[numbers])


def _rowwise_adagrad() -> Callable[..., torch.optim.Optimizer]:
    return pytest.importorskip("torchrec.optim").RowWiseAdagrad


TORCH_OPTIMIZERS = {
    "sgd": (OptimizerKind.SGD, lambda p: torch.optim.SGD([p], lr=0.1), Numbers(0.1)),
    "sgd, L2": (
        OptimizerKind.SGD,
        lambda p: torch.optim.SGD([p], lr=0.1, weight_decay=0.05),
        Numbers(0.1, weight_decay=0.05, mode=L2),
    ),
    "sgd, no mode": (
        OptimizerKind.SGD,
        lambda p: torch.optim.SGD([p], lr=0.1),
        Numbers(0.1, weight_decay=0.05, mode=NO_DECAY),
    ),
    "adagrad": (OptimizerKind.ADAGRAD, lambda p: torch.optim.Adagrad([p], lr=0.1, eps=1e-8), Numbers(0.1)),
    "adagrad, L2": (
        OptimizerKind.ADAGRAD,
        lambda p: torch.optim.Adagrad([p], lr=0.1, eps=1e-8, weight_decay=0.05),
        Numbers(0.1, weight_decay=0.05, mode=L2),
    ),
    "row-wise adagrad": (
        OptimizerKind.ROWWISE_ADAGRAD,
        lambda p: _rowwise_adagrad()([p], lr=0.1, eps=1e-8),
        Numbers(0.1),
    ),
    "row-wise adagrad, L2": (
        OptimizerKind.ROWWISE_ADAGRAD,
        lambda p: _rowwise_adagrad()([p], lr=0.1, eps=1e-8, weight_decay=0.05),
        Numbers(0.1, weight_decay=0.05, mode=L2),
    ),
    "adam, L2": (
        OptimizerKind.ADAM,
        lambda p: torch.optim.Adam([p], lr=0.1, weight_decay=0.05),
        Numbers(0.1, weight_decay=0.05, mode=L2),
    ),
    "adam, decoupled": (
        OptimizerKind.ADAM,
        lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.05),
        Numbers(0.1, weight_decay=0.05, mode=DECOUPLE),
    ),
    "adam": (OptimizerKind.ADAM, lambda p: torch.optim.Adam([p], lr=0.1), Numbers(0.1)),
    "adam with other numbers": (
        OptimizerKind.ADAM,
        lambda p: torch.optim.Adam([p], lr=0.1, betas=(0.5, 0.75), eps=1e-3),
        Numbers(0.1, 1e-3, 0.5, 0.75),
    ),
    # SparseAdam adds eps before the bias correction, so they agree where eps does not matter.
    "sparse adam": (OptimizerKind.ADAM, lambda p: torch.optim.SparseAdam([p], lr=0.1, eps=1e-20), Numbers(0.1, 1e-20)),
}


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
@pytest.mark.parametrize("dim", [4, 64])
def test_50_steps_agree_with_torch(name: str, dim: int) -> None:
    """Batches with duplicates over 32 keys, about half of them in each; rows outside a batch stay as they are."""
    kind, build, numbers = TORCH_OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(6)
    parameter = torch.nn.Parameter(torch.randn(32, dim, generator=generator))
    optimizer = build(parameter)
    memory = GroupMemory([TableGeometry.create(64, 64, 64)], RowLayout(dim, torch.float32, kind))
    memory.write(torch.arange(32), parameter.detach(), torch.zeros(32, memory.layout.state_width))
    for step in range(1, 51):
        keys = torch.randint(0, 32, (24,), generator=generator)
        gradients = torch.randn(24, dim, generator=generator)
        _torch_step(optimizer, parameter, keys, gradients)
        unique = distinct(keys.tolist())
        update(memory.view, unique, unique.keys, gradients, *hyperparameters(numbers.at(step)))
        np.testing.assert_allclose(
            memory.embeddings(torch.arange(32)).numpy(),
            parameter.detach().numpy(),
            rtol=tolerances.OPTIMIZER_RUN_RTOL,
            atol=tolerances.OPTIMIZER_RUN_ATOL,
        )


def _torch_step(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, keys: torch.Tensor, gradients: torch.Tensor
) -> None:
    """One step that leaves rows outside the batch, and their state, alone, as the update of a table does."""
    summed = torch.zeros_like(parameter).index_add_(0, keys, gradients)
    if isinstance(optimizer, torch.optim.SparseAdam):
        rows = keys.unique()
        parameter.grad = torch.sparse_coo_tensor(rows[None], summed[rows], parameter.shape, check_invariants=True)
        optimizer.step()
        return
    parameter.grad = summed
    tensors = {"": parameter.detach(), **optimizer.state[parameter]}
    before = {name: tensor.clone() for name, tensor in tensors.items() if torch.is_tensor(tensor)}
    optimizer.step()
    absent = torch.ones(len(parameter), dtype=torch.bool)
    absent[keys] = False
    for name, tensor in {"": parameter.detach(), **optimizer.state[parameter]}.items():
        if torch.is_tensor(tensor) and tensor.dim() > 0:
            tensor[absent] = before[name][absent] if name in before else 0.0
