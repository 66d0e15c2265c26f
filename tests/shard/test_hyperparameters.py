"""Hyperparameters that are set through torchrec's fused optimizer while a model trains."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from dynamicemb import DynamicEmbWarning
from dynamicemb.errors import ConfigError, UnknownHyperparameterError
from dynamicemb.kernels.update import HyperparameterColumn
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from tests import oracle_values
from tests.distributed import run_on_ranks
from tests.oracle_values import Numbers
from tests.shard.models import (
    NORMAL,
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    groups,
    one_sample,
    rows,
    table,
)

IDS = torch.arange(6)
#: By fbgemm's name: the optimizer, what it has at first, and what is set later.
CHANGES: dict[str, tuple[dict[str, Any], str, float, float]] = {
    "lr": ({"optimizer": EmbOptimType.EXACT_SGD}, "learning_rate", 0.5, 0.125),
    "eps": ({"optimizer": EmbOptimType.EXACT_ADAGRAD}, "eps", 1e-8, 0.5),
    "beta1": ({"optimizer": EmbOptimType.ADAM}, "beta1", 0.9, 0.5),
    "beta2": ({"optimizer": EmbOptimType.ADAM}, "beta2", 0.999, 0.75),
    "weight_decay": (
        {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay_mode": WeightDecayMode.L2}, "weight_decay",
        0.0, 0.25,
    ),
}  # fmt: skip


def model_of(names: list[str], fused_params: dict[str, Any], **constraints: Any) -> nn.Module:
    """Dynamic tables, unless ``constraints`` say otherwise; "other" is in a group of its own."""
    options = {"max_capacity": 512, "initializer_args": NORMAL, "eval_initializer_args": NORMAL}
    capacities = {"other": 64}
    return distribute(
        collection(*(table(name, 6) for name in names)),
        {name: dynamic(bucket_capacity=capacities.get(name, 128), **options) for name in names} | constraints,
        None,
        DynamicEmbeddingCollectionSharder(fused_params=fused_params),
    )


def step(model: nn.Module, names: list[str], optimizer: Any = None) -> None:
    """As training loops do it; the gradient of a row is the row."""
    if optimizer is not None:
        optimizer.zero_grad()
    read = rows(model, one_sample(dict.fromkeys(names, IDS)))
    sum(values.square().sum() / 2 for values in read.values()).backward()
    if optimizer is not None:
        optimizer.step()


def copy_rows(source: torch.Tensor, model: nn.Module, name: str) -> None:
    (state,) = [value for key, value in model.state_dict().items() if key.endswith(f"{name}.weight")]
    (shard,) = state.local_shards()
    shard.tensor.copy_(source)


def every_name_arrives(rank: int, world_size: int) -> None:
    for name, (params, ours, before, after) in CHANGES.items():
        names = ["a", "b", "other"]
        changed, given = (
            model_of(names, {"learning_rate": 0.5} | params | {ours: number}) for number in (before, after)
        )
        changed.fused_optimizer.update_hyper_parameters({name: after})
        others = [model_of(names, {"learning_rate": 0.5} | params | {ours: before})]
        for model in (changed, given, *others):
            step(model, names, model.fused_optimizer)
            step(model, names, model.fused_optimizer)
        rows_of = [evaluated(model, dict.fromkeys(names, IDS)) for model in (changed, given, *others)]
        for table_name in names:
            assert torch.equal(rows_of[0][table_name], rows_of[1][table_name]), (name, table_name)
            assert not torch.equal(rows_of[0][table_name], rows_of[2][table_name]), (name, table_name)


def test_every_name_arrives_in_all_tables() -> None:
    """A table whose number is set before it trains does what one does that was made with it."""
    run_on_ranks(1, every_name_arrives)


def static_and_dynamic(rank: int, world_size: int) -> None:
    for name, (params, ours, before, after) in CHANGES.items():
        if params["optimizer"] is EmbOptimType.ADAM:
            continue  # fbgemm has none on a CPU
        model = model_of(["static", "dynamic"], {"learning_rate": 0.5} | params | {ours: before}, static=STATIC)
        copy_rows(evaluated(model, {"static": IDS, "dynamic": IDS})["dynamic"], model, "static")
        step(model, ["static", "dynamic"])
        model.fused_optimizer.update_hyper_parameters({name: after})
        step(model, ["static", "dynamic"])
        values = evaluated(model, {"static": IDS, "dynamic": IDS})
        torch.testing.assert_close(values["dynamic"], values["static"], rtol=1e-5, atol=1e-6, msg=name)
        assert model.fused_optimizer.update_hyper_parameters({"lr": 0.0}) is None
        step(model, ["static", "dynamic"])
        for table_name, stopped in evaluated(model, {"static": IDS, "dynamic": IDS}).items():
            assert name == "weight_decay" or torch.equal(stopped, values[table_name]), (name, table_name)


def test_as_on_torchrec_tables() -> None:
    run_on_ranks(1, static_and_dynamic)


def a_learning_rate_that_stays(rank: int, world_size: int) -> None:
    names = ["a", "b", "other"]  # two tables of one group, and one of another
    ids = dict.fromkeys(names, IDS)
    model = model_of(names, {"learning_rate": 0.5})
    dense = nn.Linear(1, 1)
    wrapped = WarmupOptimizer(model.fused_optimizer, [WarmupStage(WarmupPolicy.CONSTANT, 1000, 1.0)], lr=0.5)
    optimizer = CombinedOptimizer(
        [
            ("sparse", wrapped),
            ("dense", KeyedOptimizerWrapper(dict(dense.named_parameters()), lambda p: torch.optim.SGD(p, lr=0.1))),
        ]
    )
    step(model, names, model.fused_optimizer)
    before = evaluated(model, ids)
    optimizer.update_hyper_parameters({"lr": 0.0})
    assert [group["lr"] for group in model.fused_optimizer.param_groups] == [0.0] * 3
    for _ in range(2):
        step(model, names, model.fused_optimizer)
    after = evaluated(model, ids)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for group in model.fused_optimizer.param_groups:  # a scheduler's word comes after it
        group["lr"] = 0.5
    step(model, names, model.fused_optimizer)
    after = evaluated(model, ids)
    assert all(torch.equal(before[name] / 2, after[name]) for name in before)


def test_a_learning_rate_stays_until_the_next_one() -> None:
    """torchrec's own tables go back to the one of the parameter group, see the class."""
    run_on_ranks(1, a_learning_rate_that_stays)


def what_is_refused(rank: int, world_size: int) -> None:
    model = model_of(["a", "b"], {"optimizer": EmbOptimType.ADAM, "learning_rate": 0.5})
    before = groups(model)[0].hyperparameters.clone()
    optimizer = model.fused_optimizer
    for params in ({"learning_rate": 0.1}, {"lr": 0.25, "momentum": 0.9}, {"eps": 0.1, "": 1.0}, {"lr": 0.1, 3: 1.0}):
        with pytest.raises(UnknownHyperparameterError, match=r"tables 'a', 'b'.*known are lr, eps, beta1") as caught:
            optimizer.update_hyper_parameters(params)
        assert isinstance(caught.value, ConfigError) and isinstance(caught.value, NotImplementedError)
    numbers = (-0.1, float("nan"), float("inf"), "0.1", None, True)
    wrong = [("lr", number) for number in numbers] + [("beta1", 1.0), ("beta2", 1.5), ("eps", -1e-8)]
    for name, value in [*wrong, ("weight_decay", -0.5), ("weight_decay", [0.1, 0.2])]:
        with pytest.raises(ConfigError, match=f"tables 'a', 'b': {name}="):
            optimizer.update_hyper_parameters({"eps": 0.25, name: value})
    for steps in (-1, 1.5, "3", None, True):
        with pytest.raises(ConfigError, match="tables 'a', 'b': optimizer step"):
            optimizer.set_optimizer_step(steps)
    assert torch.equal(groups(model)[0].hyperparameters, before) and groups(model)[0].steps.tolist() == [0, 0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_unknown_names_and_numbers_out_of_range() -> None:
    """Whatever else the call has: nothing changes."""
    run_on_ranks(1, what_is_refused)


def what_is_said(rank: int, world_size: int) -> list[str]:
    model = model_of(["a", "b"], {"optimizer": EmbOptimType.EXACT_SGD, "stochastic_rounding": False})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in (0.1, 0.2, 0.0):
            model.fused_optimizer.update_hyper_parameters({"weight_decay": number, "lower_bound": 0.1, "lr": number})
    assert groups(model)[0].hyperparameters[:, HyperparameterColumn.LEARNING_RATE].tolist() == [0.0, 0.0]
    return [str(entry.message) for entry in caught if entry.category is DynamicEmbWarning]


def test_what_is_ignored_is_said_once() -> None:
    (said,) = run_on_ranks(1, what_is_said)
    assert sum("lower_bound is ignored" in text for text in said) == 1
    assert sorted(text.split(":")[0] for text in said if "weight_decay=0.1 is ignored" in text) == [
        "table 'a'", "table 'b'",
    ]  # fmt: skip
    assert len(said) == 3


def adam_from_step_ten(rank: int, world_size: int) -> None:
    model = model_of(["a", "other"], {"optimizer": EmbOptimType.ADAM, "learning_rate": 0.5})
    before = evaluated(model, {"a": IDS, "other": IDS})
    model.fused_optimizer.set_optimizer_step(10)
    step(model, ["a", "other"], model.fused_optimizer)
    assert [group.steps.tolist() for group in groups(model)] == [[11], [11]]
    for name, after in evaluated(model, {"a": IDS, "other": IDS}).items():
        for first, last in zip(before[name], after, strict=True):
            expected, _ = oracle_values.optimizer_step(
                oracle_values.ADAM, first.numpy(), torch.zeros(2 * len(first)).numpy(), first.numpy(),
                Numbers(0.5, step=11),
            )  # fmt: skip
            torch.testing.assert_close(last.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


def test_the_step_of_adams_bias_correction() -> None:
    """fbgemm, too, counts on from the step that is set."""
    run_on_ranks(1, adam_from_step_ten)


def the_first_parameter_group(rank: int, world_size: int) -> None:
    options = dynamic(max_capacity=512, initializer_args=ZEROS)
    for constraint, follows in ((options, ["a"]), (STATIC, ["a", "b", "other"])):
        names = ["a", "b", "other"]
        model = model_of(names, {"learning_rate": 1.0}, **dict.fromkeys(names, constraint))
        if constraint is STATIC:
            for name in names:
                copy_rows(torch.zeros(6, 8), model, name)
        model.fused_optimizer.param_groups[0]["lr"] = 0.25
        model.fused_optimizer.zero_grad()
        output = model(features_of({name: [IDS.tolist()] for name in names}))
        torch.stack([jagged.values().sum() for jagged in output.values()]).sum().backward()
        for name, values in evaluated(model, dict.fromkeys(names, IDS)).items():
            rate = 0.25 if name in follows else 1.0
            assert torch.equal(values, torch.full_like(values, -rate)), (name, follows)


def test_the_first_parameter_group_is_the_first_table_alone() -> None:
    """In torchrec it is every table of the first kernel. The class says so; ``update_hyper_parameters`` has all."""
    run_on_ranks(1, the_first_parameter_group)


def groups_in_a_state_dict(rank: int, world_size: int) -> None:
    first, second = (model_of(["a", "other"], {"learning_rate": 0.5}).fused_optimizer for _ in range(2))
    first.save_param_groups(True)
    second.save_param_groups(True)
    first.param_groups[1]["lr"] = 0.125
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.5, 0.125]


def test_parameter_groups_in_the_optimizers_state_dict() -> None:
    run_on_ranks(1, groups_in_a_state_dict)
