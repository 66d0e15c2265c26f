"""From initializer arguments to first rows, against the generator of the oracle."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
import torch

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.options import EMBEDDING_DTYPES
from dynamicemb.table.initializers import initializer_view, philox_key
from dynamicemb.table.optimizers import OptimizerConfig
from tests import oracle_values
from tests.table.groups import config, group_of, keys_and_tables

DIM = 12
KEYS = [*range(-20, 20), -(2**63), 2**63 - 1, 2**40 + 3]
ROUND = {
    torch.float32: lambda values: values,
    torch.float16: oracle_values.to_float16,
    torch.bfloat16: oracle_values.to_bfloat16,
}


def derived_key(seed: int, table: str) -> int:
    """As documented: the first eight bytes of BLAKE2b over seed and name."""
    digest = hashlib.blake2b((seed % 2**64).to_bytes(8, "little") + table.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, -(2**63)])
def test_philox_key_is_as_documented(seed: int) -> None:
    assert philox_key(seed, "item") == derived_key(seed, "item")


def test_philox_keys_stay_what_they_are() -> None:
    """Written down: tables that were trained with a seed must begin alike in every release."""
    assert philox_key(0, "item") == 1319705051860442316
    assert philox_key(0, "größe") == 1973983055607112192
    assert len({philox_key(seed, name) for seed in range(100) for name in ("a", "b", "", "ab")}) == 400


def expected_rows(args: DynamicEmbInitializerArgs, dtype: torch.dtype) -> torch.Tensor:
    mode = args.mode
    if mode is DynamicEmbInitializerMode.UNIFORM:
        kind, parameters = oracle_values.UNIFORM, (args.lower, args.upper, 0.0, 0.0)
    elif mode is DynamicEmbInitializerMode.NORMAL:
        kind, parameters = oracle_values.NORMAL, (args.mean, args.std_dev, 0.0, 0.0)
    elif mode is DynamicEmbInitializerMode.TRUNCATED_NORMAL:
        distribution = NormalDist(args.mean, args.std_dev)
        bounds = distribution.cdf(args.lower), distribution.cdf(args.upper)
        kind, parameters = oracle_values.TRUNCATED_NORMAL, (args.mean, args.std_dev, *bounds)
    elif mode is DynamicEmbInitializerMode.CONSTANT:
        kind, parameters = oracle_values.CONSTANT, (args.value, 0.0, 0.0, 0.0)
    else:
        kind, parameters = oracle_values.DEBUG, (0.0, 0.0, 0.0, 0.0)
    values = oracle_values.first_values(KEYS, derived_key(7, "item"), kind, parameters, DIM)
    return torch.from_numpy(np.ascontiguousarray(ROUND[dtype](values)))


@pytest.mark.parametrize("dtype", EMBEDDING_DTYPES)
@pytest.mark.parametrize("mode", list(DynamicEmbInitializerMode))
def test_first_rows(mode: DynamicEmbInitializerMode, dtype: torch.dtype) -> None:
    args = DynamicEmbInitializerArgs(mode=mode, mean=0.25, std_dev=1.5, lower=-1.0, upper=2.0, value=0.3)
    group = group_of(
        config(capacity=1024, dim=DIM, embedding_dtype=dtype, seed=7, initializer=args, eval_initializer=args)
    )
    expected = expected_rows(args, dtype)
    assert torch.equal(group.eval_lookup(*keys_and_tables(KEYS)), expected), "promised"
    rows, _ = group.train_lookup(*keys_and_tables(KEYS))
    assert rows.dtype is torch.float32 and torch.equal(rows, expected), "inserted"


@pytest.mark.parametrize("other", list(DynamicEmbInitializerMode))
@pytest.mark.parametrize("mode", list(DynamicEmbInitializerMode))
def test_the_host_knows_whether_a_table_is_normal(
    mode: DynamicEmbInitializerMode, other: DynamicEmbInitializerMode
) -> None:
    """One such table is enough; without its quantile, kernels of the GPU engine would write wrong rows."""
    arguments = [DynamicEmbInitializerArgs(mode=mode, lower=-1.0, upper=2.0) for mode in (mode, other)]
    view = initializer_view(["a", "b"], [0, 0], arguments, [0.0, 0.0], torch.device("cpu"))
    normal = {DynamicEmbInitializerMode.NORMAL, DynamicEmbInitializerMode.TRUNCATED_NORMAL}
    assert view.any_normal is not normal.isdisjoint({mode, other})


@pytest.mark.parametrize(("mean", "value"), [(0.5, 0.5), (9.0, 2.0), (-9.0, -1.0)])
def test_truncated_normal_without_deviation(mean: float, value: float) -> None:
    mode = DynamicEmbInitializerMode.TRUNCATED_NORMAL
    args = DynamicEmbInitializerArgs(mode=mode, mean=mean, std_dev=0.0, lower=-1.0, upper=2.0)
    rows, _ = group_of(config(initializer=args)).train_lookup(*keys_and_tables([1, 2]))
    assert rows.unique().tolist() == [value]


def test_initial_accumulator_value_of_each_table() -> None:
    first, second = (OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD, initial_accumulator_value=v) for v in (0.5, 2.0))
    group = group_of(config("first", optimizer=first), config("second", optimizer=second))
    for table, value in enumerate((0.5, 2.0)):
        group.train_lookup(*keys_and_tables([1, 2, 3], table))
        assert group.stored_rows(table).states["sum"].unique().tolist() == [value]
