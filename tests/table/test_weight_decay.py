"""What becomes of ``weight_decay`` and its mode: which of them an optimizer applies, and what is said of the others."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import pytest
import torch

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.errors import ConfigError, DynamicEmbWarning
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.update import WeightDecayMode
from dynamicemb.table.config import TableConfig
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig, ignored_parameters, optimizer_from_fused_params

NONE, L2, DECOUPLE = WeightDecayMode
#: By optimizer: what it applies in the modes NONE, L2 and DECOUPLE. fbgemm's, see tests/shard/test_weight_decay.py.
APPLIED = {
    "exact_sgd": (NONE, NONE, NONE),
    "exact_adagrad": (NONE, NONE, NONE),
    "exact_row_wise_adagrad": (NONE, L2, DECOUPLE),
    "adam": (DECOUPLE, DECOUPLE, DECOUPLE),
}


def of(optimizer: str, **params: Any) -> OptimizerConfig:
    return optimizer_from_fused_params("ads", {"optimizer": optimizer, **params})


def texts(optimizer: str, **params: Any) -> list[str]:
    config = of(optimizer, **params)
    return ignored_parameters("ads", config, {"optimizer": optimizer, **params}, torch.float32)


@pytest.mark.parametrize("optimizer", APPLIED)
def test_what_is_applied(optimizer: str) -> None:
    assert of(optimizer, weight_decay=0.1).applied_weight_decay is APPLIED[optimizer][0]
    for mode, applied in zip(WeightDecayMode, APPLIED[optimizer], strict=True):
        assert of(optimizer, weight_decay=0.1, weight_decay_mode=mode).applied_weight_decay is applied


@pytest.mark.parametrize("name", ["NONE", "L2", "DECOUPLE"])
def test_a_mode_by_enum_value_and_name(name: str) -> None:
    theirs = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training").WeightDecayMode
    assert theirs[name].value == WeightDecayMode[name]
    for given in (theirs[name], theirs[name].value, name, name.lower(), WeightDecayMode[name]):
        assert of("exact_row_wise_adagrad", weight_decay_mode=given).weight_decay_mode is WeightDecayMode[name]


@pytest.mark.parametrize("mode", [3, 4, 5, "COUNTER", "COWCLIP", "DECOUPLE_GLOBAL", "l3", -1, True, 1.5, object()])
@pytest.mark.parametrize("optimizer", APPLIED)
def test_modes_that_cannot_be_honoured(optimizer: str, mode: object) -> None:
    with pytest.raises(
        ConfigError, match=r"table 'ads': fused parameter weight_decay_mode=.* use NONE, L2 or DECOUPLE"
    ):
        of(optimizer, weight_decay_mode=mode)


def test_fbgemms_other_modes_cannot_be_honoured() -> None:
    theirs = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training").WeightDecayMode
    others = [mode for mode in theirs if mode.name not in WeightDecayMode.__members__]
    assert others
    for mode in others:
        with pytest.raises(ConfigError, match="weight_decay_mode"):
            of("exact_row_wise_adagrad", weight_decay_mode=mode)


def test_a_number_that_is_ignored_is_said() -> None:
    for optimizer, name in (("exact_sgd", "SGD"), ("exact_adagrad", "Adagrad")):
        for mode in WeightDecayMode:
            (text,) = texts(optimizer, weight_decay=0.1, weight_decay_mode=mode)
            assert text.startswith("table 'ads': weight_decay=0.1 is ignored") and f"fbgemm's {name} has no" in text
    for given in ({}, {"weight_decay_mode": "NONE"}):
        (text,) = texts("exact_row_wise_adagrad", weight_decay=0.1, **given)
        assert "weight_decay=0.1 is ignored" in text and "row-wise Adagrad is NONE" in text and "L2 or DECOUPLE" in text


def test_a_mode_that_is_ignored_is_said() -> None:
    for mode in (NONE, L2):
        (text,) = texts("adam", weight_decay=0.1, weight_decay_mode=mode)
        assert f"weight_decay_mode={mode.name} is ignored" in text and "fbgemm's Adam is decoupled" in text


def test_nothing_is_said_where_nothing_is_ignored() -> None:
    for mode in (L2, DECOUPLE):
        assert not texts("exact_row_wise_adagrad", weight_decay=0.1, weight_decay_mode=mode)
    assert not texts("adam", weight_decay=0.1)
    assert not texts("adam", weight_decay=0.1, weight_decay_mode="decouple")
    for optimizer in APPLIED:
        for mode in WeightDecayMode:
            assert not texts(optimizer, weight_decay=0.0, weight_decay_mode=mode)


def test_an_enum_of_that_kind_is_read_by_its_name() -> None:
    other = enum.Enum("CounterWeightDecayMode", {"L2": 7, "ADAGRADW": 1})
    assert of("adam", weight_decay_mode=other["L2"]).weight_decay_mode is L2
    with pytest.raises(ConfigError):
        of("adam", weight_decay_mode=other["ADAGRADW"])


@pytest.mark.parametrize("kind", OptimizerKind)
def test_tables_share_a_group_if_they_apply_the_same(kind: OptimizerKind) -> None:
    keys = {
        TableConfig("t", 4, 8, 8, optimizer=OptimizerConfig(kind, weight_decay_mode=mode)).group_key
        for mode in WeightDecayMode
    }
    assert len(keys) == (3 if kind is OptimizerKind.ROWWISE_ADAGRAD else 1)


def group_of(weight_decay: float) -> TableGroup:
    optimizer = OptimizerConfig(OptimizerKind.SGD, weight_decay=weight_decay)
    initializer = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.NORMAL)
    config = TableConfig("t", 4, 8, 8, bucket_capacity=8, initializer=initializer, optimizer=optimizer)
    return TableGroup([config], 1, torch.device("cpu"))


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_the_number_of_a_checkpoint_is_said_if_it_is_ignored_and_not_the_tables_own(own: float) -> None:
    group = group_of(own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group.restore(0, group_of(0.5).progress(0), 0)
    assert group.progress(0).hyperparameters[-1] == 0.5
    assert [entry.category for entry in caught] == [DynamicEmbWarning] * (own == 0.0)
    assert all("weight_decay=0.5 is ignored" in str(e.message) and "checkpoint" in str(e.message) for e in caught)
