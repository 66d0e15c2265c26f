"""Which optimizer fused parameters describe, and the errors for those that cannot be honoured."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch

from dynamicemb.errors import ConfigError
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import (
    HYPERPARAMETERS,
    OptimizerConfig,
    ignored_parameters,
    optimizer_from_fused_params,
)


def test_sgd_is_the_default_as_in_fbgemm() -> None:
    assert optimizer_from_fused_params("t", {}) == OptimizerConfig(OptimizerKind.SGD, learning_rate=0.01)


NAMES = {
    "sgd": OptimizerKind.SGD,
    "exact_sgd": OptimizerKind.SGD,
    "exact_adagrad": OptimizerKind.ADAGRAD,
    "exact_row_wise_adagrad": OptimizerKind.ROWWISE_ADAGRAD,
    "row_wise_adagrad": OptimizerKind.ROWWISE_ADAGRAD,
    "adam": OptimizerKind.ADAM,
}


@pytest.mark.parametrize("name", NAMES)
def test_by_name_and_by_enum(name: str) -> None:
    kind = enum.Enum("EmbOptimType", {"THIS": name})
    for optimizer in (name, kind.THIS):
        assert optimizer_from_fused_params("t", {"optimizer": optimizer}).kind is NAMES[name]


@pytest.mark.parametrize("name", ["EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD", "ADAM"])
def test_fbgemms_own_enum(name: str) -> None:
    module = pytest.importorskip("fbgemm_gpu.split_embedding_configs")
    kind = optimizer_from_fused_params("t", {"optimizer": module.EmbOptimType[name]}).kind
    assert kind.name == name.removeprefix("EXACT_")


def test_every_number() -> None:
    config = optimizer_from_fused_params(
        "t",
        {"optimizer": "adam", "learning_rate": 0.5, "eps": 1e-4, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1},
    )
    assert config == OptimizerConfig(OptimizerKind.ADAM, 0.5, 1e-4, 0.8, 0.95, 0.1)
    assert config.hyperparameters() == [0.5, 1e-4, 0.8, 0.95, 0.1]
    assert HYPERPARAMETERS == ("learning_rate", "eps", "beta1", "beta2", "weight_decay")


def test_torch_spellings() -> None:
    config = optimizer_from_fused_params("t", {"optimizer": "adam", "lr": 0.5, "betas": (0.8, 0.95)})
    assert (config.learning_rate, config.beta1, config.beta2) == (0.5, 0.8, 0.95)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_initial_state(kind: OptimizerKind) -> None:
    expected = 0.25 if kind in (OptimizerKind.ADAGRAD, OptimizerKind.ROWWISE_ADAGRAD) else 0.0
    assert OptimizerConfig(kind, initial_accumulator_value=0.25).initial_state == expected


def test_parameters_of_static_tables_are_ignored() -> None:
    params: dict[str, Any] = {
        "optimizer": "exact_adagrad", "cache_load_factor": 0.2, "enforce_hbm": True, "bounds_check_mode": 3,
        "output_dtype": None, "stochastic_rounding": False, "prefetch_pipeline": False, "cache_sets": 4,
        "uvm_host_mapped": True, "embedding_table_index_type": torch.int32, "gradient_clipping": False,
        "max_norm": 0.0, "global_weight_decay": None, "optimizer_state_dtypes": None,
    }  # fmt: skip
    assert optimizer_from_fused_params("t", params) == OptimizerConfig(OptimizerKind.ADAGRAD)


def test_neutral_values_of_torch_optim_are_accepted() -> None:
    params = {"lr": 0.1, "momentum": 0, "dampening": 0, "nesterov": False, "maximize": False, "foreach": None}
    assert optimizer_from_fused_params("t", params) == OptimizerConfig(learning_rate=0.1)
    params = {"optimizer": "adam", "amsgrad": False, "capturable": False, "fused": None}
    assert optimizer_from_fused_params("t", params) == OptimizerConfig(OptimizerKind.ADAM)


@pytest.mark.parametrize("optimizer", ["lamb", "partial_row_wise_adam", "lars_sgd", "none", "", None, 3])
def test_unknown_optimizers(optimizer: object) -> None:
    with pytest.raises(ConfigError, match=f"table 'ads': optimizer {optimizer} is not supported .* use SGD, Adagrad"):
        optimizer_from_fused_params("ads", {"optimizer": optimizer})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", 0.9),
        ("nesterov", True),
        ("amsgrad", True),
        ("maximize", True),
        ("lr_decay", 0.1),
        ("weight_decay_mode", 3),
        ("global_weight_decay", object()),
        ("counter_based_regularization", object()),
        ("extra_optimizer_config", object()),
        ("optimizer_state_dtypes", {"momentum1": 1}),
        ("momentum", "0"),
        ("learning_rates", 0.1),
        ("kind", OptimizerKind.ADAM),
        ("max_norm", 1.0),
        ("max_gradient", 1.0),
        ("gradient_clipping", True),
    ],
)
def test_parameters_that_cannot_be_honoured(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"table 'ads': fused parameter {name}=.* cannot be honoured"):
        optimizer_from_fused_params("ads", {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("eps", -1e-8),
        ("beta1", 1.0),
        ("beta2", 1.5),
        ("beta1", -0.1),
        ("weight_decay", -1.0),
        ("initial_accumulator_value", -0.5),
    ],
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"table 'ads': {name}={value} is outside"):
        optimizer_from_fused_params("ads", {name: value})


@pytest.mark.parametrize("value", ["0.1", "abc", None, True, [0.1, 0.2], object()])
def test_what_is_not_a_number(value: object) -> None:
    with pytest.raises(ConfigError, match=r"table 'ads': learning_rate=.* is (not a number|outside)"):
        optimizer_from_fused_params("ads", {"lr": value})


@pytest.mark.parametrize("betas", [(0.9,), 0.9, None, (0.9, 0.99, 0.999)])
def test_betas_are_two(betas: object) -> None:
    with pytest.raises(ConfigError, match=r"table 'ads': betas=.* give the two of them"):
        optimizer_from_fused_params("ads", {"betas": betas})


def test_a_number_may_be_a_tensor() -> None:
    assert optimizer_from_fused_params("t", {"lr": torch.tensor(0.5)}).learning_rate == 0.5


HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("given", [{}, {"stochastic_rounding": True}, {"stochastic_rounding": False}])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_stochastic_rounding_is_missed_where_rows_have_16_bits(given: dict[str, bool], dtype: torch.dtype) -> None:
    """fbgemm rounds stochastically unless told otherwise."""
    texts = ignored_parameters("ads", OptimizerConfig(), given, dtype)
    assert len(texts) == (dtype in HALF and given.get("stochastic_rounding", True))
    share = {torch.float16: "0.02% to 0.05%", torch.bfloat16: "0.20% to 0.39%"}.get(dtype, "")
    assert all("table 'ads': stochastic_rounding" in text and share in text for text in texts)


@pytest.mark.parametrize("dtype", HALF)
def test_the_updates_that_are_lost(dtype: torch.dtype) -> None:
    """The shares of the warning: below the lower one no update arrives, from the upper one on every one does."""
    eps = torch.finfo(dtype).eps
    for value in (1.0, 1.5, 2.0 - eps, 0.75, 100.0):
        row = torch.tensor(value, dtype=dtype)
        assert (row.float() - 0.99 * eps / 4 * row.float()).to(dtype) == row
        assert (row.float() - 1.01 * eps / 2 * row.float()).to(dtype) != row


def test_the_given_mapping_is_not_modified() -> None:
    params = {"optimizer": "adam", "lr": 0.5, "betas": (0.8, 0.95)}
    optimizer_from_fused_params("t", params)
    assert params == {"optimizer": "adam", "lr": 0.5, "betas": (0.8, 0.95)}
