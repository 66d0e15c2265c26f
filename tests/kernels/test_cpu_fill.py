"""First values of rows on the CPU engine, against the independent generator of the oracle: the same bits."""

from __future__ import annotations

from statistics import NormalDist

import numba
import numpy as np
import pytest
import torch

from dynamicemb.kernels.fill import FillMode, fill, fill_missing
from dynamicemb.kernels.fill.cpu import quantile
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import InitializerView, KeyStatus
from tests import oracle_values, tolerances
from tests.kernels.first_rows import initial_rows
from tests.kernels.keys import EXTREME_KEYS
from tests.kernels.memory import GroupMemory
from tests.kernels.paired import distinct, int32, int64

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (4, 8, 20, 64, 128, 1024)
NORMAL_CDF = NormalDist().cdf
PARAMETERS = {
    FillMode.CONSTANT: (0.1, 0.0, 0.0, 0.0),
    FillMode.UNIFORM: (-0.3, 0.7, 0.0, 0.0),
    FillMode.NORMAL: (0.25, 1.5, 0.0, 0.0),
    FillMode.TRUNCATED_NORMAL: (0.25, 1.5, NORMAL_CDF(-2.0), NORMAL_CDF(2.0)),
    FillMode.DEBUG: (0.0, 0.0, 0.0, 0.0),
}
ROUNDING = {
    torch.float32: lambda x: x,
    torch.float16: oracle_values.to_float16,
    torch.bfloat16: oracle_values.to_bfloat16,
}


def initializers(*tables: tuple[int, FillMode, tuple[float, ...], float]) -> InitializerView:
    """(seed, mode, parameters, first value of states) of each table."""
    seeds, modes, parameters, states = zip(*tables)
    return InitializerView(
        int64(seeds), int32(modes), torch.tensor(parameters, dtype=torch.float64), torch.tensor(states),
        any_normal=FillMode.NORMAL in modes or FillMode.TRUNCATED_NORMAL in modes,
    )  # fmt: skip


def expected_rows(keys: list[int], seed: int, mode: FillMode, dim: int, dtype: torch.dtype) -> torch.Tensor:
    values = oracle_values.first_values(keys, seed, mode, PARAMETERS[mode], dim)
    return torch.from_numpy(ROUNDING[dtype](values))


def test_known_words() -> None:
    # Counter and key zero: the published words of Philox4x32-10.
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], np.float64)
    init = initializers((0, FillMode.UNIFORM, (0.0, 1.0, 0.0, 0.0), 0.0))
    rows = initial_rows(int64([0]), int32([0]), init, 4, torch.float32)
    np.testing.assert_array_equal(rows.numpy()[0], ((words + 0.5) / 2**32).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("mode", FillMode)
def test_rows_are_those_of_the_oracle(mode: FillMode, dim: int, dtype: torch.dtype) -> None:
    keys = [*EXTREME_KEYS, *range(-99, 100), 99_999, 100_000, -100_000, -100_001]
    for seed in (0, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF):
        init = initializers((seed, mode, PARAMETERS[mode], 0.0))
        rows = initial_rows(int64(keys), int32([0] * len(keys)), init, dim, dtype)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, expected_rows(keys, seed, mode, dim, dtype))


@pytest.mark.parametrize("mode", FillMode)
def test_every_table_has_its_own_initializer(mode: FillMode) -> None:
    init = initializers(*((table * 1000, m, PARAMETERS[m], 0.0) for table, m in enumerate([*FillMode, mode])))
    tables = [key % 6 for key in range(60)]
    rows = initial_rows(int64(range(60)), int32(tables), init, 8, torch.float32)
    modes = [*FillMode, mode]
    for key, table in enumerate(tables):
        assert torch.equal(rows[key : key + 1], expected_rows([key], table * 1000, modes[table], 8, torch.float32))


def test_a_row_depends_on_seed_key_and_column_only() -> None:
    init = initializers((7, FillMode.UNIFORM, PARAMETERS[FillMode.UNIFORM], 0.0))
    other = initializers((8, FillMode.UNIFORM, PARAMETERS[FillMode.UNIFORM], 0.0))
    tables = int32([0] * 100)
    rows = initial_rows(int64(range(100)), tables, init, 20, torch.float32)
    assert torch.equal(initial_rows(int64(range(99, -1, -1)), tables, init, 20, torch.float32).flip(0), rows)
    assert torch.equal(initial_rows(int64(range(100)), tables, init, 8, torch.float32), rows[:, :8])
    assert (initial_rows(int64(range(100)), tables, other, 20, torch.float32) != rows).any(dim=1).all()
    assert rows.unique().numel() > 1990


def test_many_rows_in_two_threads(two_threads: None) -> None:
    keys = list(range(-6000, 6000))
    init = initializers((3, FillMode.NORMAL, PARAMETERS[FillMode.NORMAL], 0.0))
    rows = initial_rows(int64(keys), int32([0] * len(keys)), init, 8, torch.float32)
    assert torch.equal(rows, expected_rows(keys, 3, FillMode.NORMAL, 8, torch.float32))


def test_no_rows() -> None:
    init = initializers((3, FillMode.NORMAL, PARAMETERS[FillMode.NORMAL], 0.0))
    assert initial_rows(int64([]), int32([]), init, 8, torch.float32).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_keys_that_have_a_slot_stay(dtype: torch.dtype) -> None:
    """Whatever the slot: only that it is one counts."""
    init = initializers((5, FillMode.UNIFORM, PARAMETERS[FillMode.UNIFORM], 0.0))
    keys, slots = list(range(50)), int64([-1 if key % 3 else key << 40 for key in range(50)])
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.where((slots < 0)[:, None], expected_rows(keys, 5, FillMode.UNIFORM, 20, dtype), rows)
    fill_missing(rows, int64(keys), int32([0] * 50), slots, init, dtype)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OptimizerKind)
@pytest.mark.parametrize("dim", [4, 20, 128])
def test_fill_writes_new_rows_and_no_others(dim: int, kind: OptimizerKind, dtype: torch.dtype) -> None:
    memory = GroupMemory([TableGeometry.create(64, 64, 64)] * 2, RowLayout(dim, dtype, kind))
    init = initializers(
        (5, FillMode.NORMAL, PARAMETERS[FillMode.NORMAL], 0.5), (6, FillMode.UNIFORM, PARAMETERS[FillMode.UNIFORM], 2.0)
    )
    unique = distinct(list(range(20)) * 2, [0] * 20 + [1] * 20)
    # Slots of both tables in descending order, and each status in turn; refused keys have no slot.
    status = torch.tensor([entry % 4 for entry in range(40)], dtype=torch.int8)
    slots = (unique.tables.long() * 32 << 40) | (63 - torch.arange(40))
    slots[status == KeyStatus.REFUSED] = -1
    written = (status == KeyStatus.INSERTED) | (status == KeyStatus.REPLACED)
    before = memory.row_bytes(slots)
    untouched = memory.snapshot()
    fill(memory.view, unique, slots, status, init)
    assert torch.equal(memory.row_bytes(slots)[~written], before[~written])
    for entry in written.nonzero()[:, 0].tolist():
        table, key, slot = int(unique.tables[entry]), int(unique.keys[entry]), slots[entry : entry + 1]
        mode = (FillMode.NORMAL, FillMode.UNIFORM)[table]
        assert torch.equal(memory.embeddings(slot).float(), expected_rows([key], 5 + table, mode, dim, dtype))
        assert memory.states(slot).tolist() == [[(0.5, 2.0)[table]] * memory.layout.state_width]
    # Everything but the written rows is as it was: restore those and compare every byte.
    for handle in slots[written].tolist():
        memory.chunks[handle >> 45][0].rows[handle & (2**40 - 1)] = 255
    assert not memory.changed_since(untouched)


def test_filled_rows_are_initial_rows() -> None:
    memory = GroupMemory([TableGeometry.create(64, 64, 64)], RowLayout(20, torch.bfloat16, OptimizerKind.ADAM))
    init = initializers((5, FillMode.NORMAL, PARAMETERS[FillMode.NORMAL], 0.0))
    unique = distinct(list(range(30)))
    assert find(memory.view, unique).tolist() == [-1] * 30
    slots = torch.arange(30) * 2
    fill(memory.view, unique, slots, torch.full((30,), KeyStatus.INSERTED, dtype=torch.int8), init)
    direct = initial_rows(int64(range(30)), int32([0] * 30), init, 20, torch.bfloat16)
    assert torch.equal(gather(memory.view, slots, unique.inverse), direct)


@numba.njit(error_model="numpy")
def quantiles(p: np.ndarray) -> np.ndarray:
    """Functions of kernels can only be called from compiled code."""
    result = np.empty_like(p)
    for i in range(p.size):
        result[i] = quantile(p[i])
    return result


def test_quantile_over_everything_that_a_word_can_give() -> None:
    words = np.concatenate(
        [[0, 1, 2, 3, 10, 2**31 - 1, 2**31, 2**32 - 3, 2**32 - 2, 2**32 - 1], np.geomspace(4, 2**32, 500)]
    )
    p = (np.floor(words[words < 2**32]) + 0.5) / 2.0**32
    bound = oracle_values.TAIL_BOUND
    p = np.concatenate([p, 1.0 - p, np.linspace(0.001, 0.999, 999), [bound, 1 - bound, np.nextafter(bound, 0)]])
    actual = quantiles(p)
    expected = np.array([NormalDist().inv_cdf(value) for value in p])
    np.testing.assert_allclose(actual, expected, rtol=tolerances.NORMAL_QUANTILE_RTOL, atol=1e-15)
    np.testing.assert_array_equal(actual.astype(np.float32), oracle_values.normal_quantile(p).astype(np.float32))


def test_quantiles_of_probabilities_that_have_few_bits() -> None:
    """Bounds of a truncated distribution may lie where probabilities are subnormal: 37.5 deviations from the mean."""
    least_normal = np.finfo(np.float64).smallest_normal
    p = np.array([5e-324, 1e-320, 3e-310, np.nextafter(least_normal, 0), least_normal, 1e-307, 1e-200, 1e-20])
    np.testing.assert_array_equal(quantiles(p).astype(np.float32), oracle_values.normal_quantile(p).astype(np.float32))
    assert (np.diff(quantiles(p)) >= 0).all() and quantiles(p)[0] < -38


def test_distributions_have_their_moments() -> None:
    keys, tables = torch.arange(15_625), torch.zeros(15_625, dtype=torch.int32)

    def sample(mode: FillMode, parameters: tuple[float, ...]) -> torch.Tensor:
        return initial_rows(keys, tables, initializers((9, mode, parameters, 0.0)), 64, torch.float32).double()

    normal = sample(FillMode.NORMAL, (0.0, 1.0, 0.0, 0.0))
    assert abs(normal.mean()) < tolerances.SAMPLE_MOMENT_ATOL
    assert abs(normal.std() - 1.0) < tolerances.SAMPLE_MOMENT_ATOL
    uniform = sample(FillMode.UNIFORM, (-1.0, 1.0, 0.0, 0.0))
    assert abs(uniform.mean()) < tolerances.SAMPLE_MOMENT_ATOL
    assert abs(uniform.std() - 3**-0.5) < tolerances.SAMPLE_MOMENT_ATOL
    assert -1.0 <= uniform.min() < -0.9999 and 0.9999 < uniform.max() <= 1.0
    truncated = sample(FillMode.TRUNCATED_NORMAL, (3.0, 0.5, NORMAL_CDF(-2.0), NORMAL_CDF(2.0)))
    assert 2.0 <= truncated.min() < 2.001 and 3.999 < truncated.max() <= 4.0
    assert abs(truncated.mean() - 3.0) < tolerances.SAMPLE_MOMENT_ATOL
    # Standard deviation of a standard normal truncated at two: 0.8796257.
    assert abs(truncated.std() - 0.5 * 0.8796257) < tolerances.SAMPLE_MOMENT_ATOL
