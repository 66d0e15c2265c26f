"""First values of rows on the Triton engine: the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dynamicemb.kernels.fill import FillMode, fill_missing
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import InitializerView
from tests.kernels.first_rows import initial_rows
from tests.kernels.group_state import Twins, both_engines, initializers
from tests.kernels.keys import EXTREME_KEYS
from tests.kernels.triton_host import MARKS

pytestmark = MARKS
#: Modes of groups whose kernels are compiled without the quantile, and the others.
PLAIN_MODES = (FillMode.UNIFORM, FillMode.CONSTANT, FillMode.DEBUG)
NORMAL_MODES = (FillMode.NORMAL, FillMode.TRUNCATED_NORMAL)


def keys_and_tables(count: int, tables: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    keys[: len(EXTREME_KEYS)] = torch.tensor(EXTREME_KEYS)[:count]
    return keys, torch.arange(count, dtype=torch.int32) % tables


def one(mode: FillMode, low: float = 0.0, high: float = 0.0) -> InitializerView:
    """A table whose standard normal distribution is, or is not, truncated at these probabilities."""
    parameters = torch.tensor([[0.0, 1.0, low, high]], dtype=torch.float64)
    modes = torch.tensor([int(mode)], dtype=torch.int32)
    return InitializerView(torch.tensor([-7]), modes, parameters, torch.zeros(1), any_normal=mode in NORMAL_MODES)


# Keys of DEBUG rows beyond what float16 holds.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dim", [4, 20, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modes", [tuple(FillMode), PLAIN_MODES], ids=["all", "plain"])
def test_all_modes_agree(modes: tuple[FillMode, ...], dim: int, dtype: torch.dtype) -> None:
    keys, tables = keys_and_tables(40, 5)
    expected, actual = both_engines(initial_rows, keys, tables, initializers(5, modes), dim, dtype)
    assert torch.equal(actual.cpu(), expected)


def test_without_the_quantile_the_other_modes_are_the_same() -> None:
    """The two ways of compiling the kernel agree on what both can do."""
    plain = initializers(3, PLAIN_MODES)
    keys, tables = keys_and_tables(40, 3)
    rows = [both_engines(initial_rows, keys, tables, init, 20, torch.float32)[1]
            for init in (plain, dataclasses.replace(plain, any_normal=True))]  # fmt: skip
    assert torch.equal(*rows)


def test_quantiles_agree_in_both_tails_and_the_centre() -> None:
    expected, actual = both_engines(initial_rows, *keys_and_tables(300, 1), one(FillMode.NORMAL), 64, torch.float32)
    assert torch.equal(actual.cpu(), expected)
    assert expected.min() < -3.5 and expected.max() > 3.5


# Bounds far out in one tail: probabilities that are tiny, subnormal, equal, zero and one.
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1e-300), (3e-320, 9e-320), (0.25, 0.25), (0.0, 0.0), (1.0, 1.0), (1 - 2**-53, 1.0), (0.0, 1.0)],
)
def test_truncation_at_the_edges(low: float, high: float) -> None:
    init = one(FillMode.TRUNCATED_NORMAL, low, high)
    expected, actual = both_engines(initial_rows, *keys_and_tables(24, 1), init, 8, torch.float32)
    assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))


def test_no_keys() -> None:
    expected, actual = both_engines(initial_rows, *keys_and_tables(0, 1), initializers(1), 8, torch.float32)
    assert actual.shape == expected.shape == (0, 8)


def filled(rows: torch.Tensor, *arguments: Any) -> torch.Tensor:
    fill_missing(rows, *arguments)
    return rows


# Tiles are of 64 entries, and three programs share them in the interpreter.
@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("missing", ["none", "first", "last", "some", "all"])
def test_missing_rows_are_written_and_no_others(missing: str, count: int) -> None:
    keys, tables = keys_and_tables(count, 3)
    chosen = {
        "none": torch.zeros(count, dtype=torch.bool),
        "first": torch.arange(count) == 0,
        "last": torch.arange(count) == count - 1,
        "some": torch.arange(count) % 97 < 2,
        "all": torch.ones(count, dtype=torch.bool),
    }[missing]
    slots = torch.where(chosen, -1, torch.arange(count) << 40)
    before = torch.full((count, 12), torch.nan)
    arguments = (keys, tables, slots, initializers(3, PLAIN_MODES), torch.bfloat16)
    expected, actual = both_engines(filled, before.clone(), *arguments)
    assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))
    written = ~expected.isnan()
    assert torch.equal(written, chosen[:, None].expand(-1, 12))


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modes", [tuple(FillMode), PLAIN_MODES], ids=["all", "plain"])
def test_rows_and_states_of_new_keys_only(
    modes: tuple[FillMode, ...], optimizer: OptimizerKind, dtype: torch.dtype
) -> None:
    """Rows of keys that were found stay; padding is never written."""
    pair = Twins([TableGeometry.create(32, 32, 8)] * 5, RowLayout(12, dtype, optimizer))
    pair.initializers = initializers(5, modes)
    for first in (0, 20, 40):
        pair.train(*keys_and_tables(first + 20, 5), torch.tensor([first]))
