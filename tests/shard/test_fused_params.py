"""Fused parameters that have another meaning, or none, for a dynamic table: each is honoured, refused or spoken of."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode, DynamicEmbWarning
from dynamicemb.errors import ConfigError
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from tests.distributed import run_on_ranks
from tests.shard.models import collection, distribute, dynamic, evaluated, one_sample, rows, table

ONES = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=1.0)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_of(fused_params: dict[str, Any], **of_constraint: Any) -> tuple[torch.nn.Module, list[str]]:
    """A table of each dtype that begins with ones, and what was said when it was made."""
    constraints = {
        name: dynamic(max_capacity=512, initializer_args=ONES, embedding_dtype=dtype) for name, dtype in DTYPES.items()
    }
    for constraint in constraints.values():
        for name, value in of_constraint.items():
            setattr(constraint, name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharder = DynamicEmbeddingCollectionSharder(fused_params={"learning_rate": 0.001, **fused_params})
        model = distribute(collection(*map(table, DTYPES)), constraints, None, sharder)
    return model, [str(entry.message) for entry in caught if entry.category is DynamicEmbWarning]


def small_updates(rank: int, world_size: int) -> list[tuple[str, list[str], dict[str, float]]]:
    results = []
    for case, params, of_constraint in (
        ("default", {}, {}),
        ("on", {"stochastic_rounding": True}, {}),
        ("off", {"stochastic_rounding": False}, {}),
        ("constraint", {}, {"stochastic_rounding": False}),
    ):
        model, said = model_of(params, **of_constraint)
        ids = dict.fromkeys(DTYPES, torch.arange(4))
        for _ in range(200 if case == "on" else 1):
            torch.stack([values.sum() for values in rows(model, one_sample(ids)).values()]).sum().backward()
        results.append((case, said, {name: float(values[0, 0]) for name, values in evaluated(model, ids).items()}))
    return results


def test_updates_that_16_bits_lose_are_spoken_of_once() -> None:
    (results,) = run_on_ranks(1, small_updates)
    for case, said, trained in results:
        names = sorted(text.split("'")[1] for text in said if "stochastic_rounding" in text)
        assert names == (["bf16", "fp16"] if case in ("default", "on") else []), (case, said)
        assert len(said) == len(names)
        if case == "on":
            assert trained["bf16"] == 1.0 and trained["fp32"] == pytest.approx(0.8, abs=1e-4)


def test_options_that_change_nothing_are_taken_in_silence() -> None:
    (said,) = run_on_ranks(1, harmless)
    assert said == []


def harmless(rank: int, world_size: int) -> list[str]:
    params = {"cache_load_factor": 0.5, "bounds_check_mode": 3, "uvm_host_mapped": False, "max_norm": 0.0}
    return model_of({"stochastic_rounding": False, **params})[1]


def another_precision(rank: int, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        model_of({"weights_precision": SparseType.FP16, "stochastic_rounding": False})
    return str(caught.value)


def test_a_precision_that_is_not_that_of_the_rows() -> None:
    (message,) = run_on_ranks(1, another_precision)
    assert "table 'fp32': fused parameter weights_precision=FP16" in message and "torch.float32" in message
