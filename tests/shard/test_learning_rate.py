"""The learning rate of dynamic tables through torchrec's fused optimizer: schedulers, warm-up, one table alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests import tolerances
from tests.distributed import run_on_ranks
from tests.shard.models import NORMAL, STATIC, ZEROS, collection, distribute, dynamic, evaluated, features_of, table

IDS = {"item": torch.arange(12), "user": torch.arange(12)}
#: The same in every step: key k of item comes k mod 4 times.
BATCH = {"item": [[key] * (key % 4) for key in range(12)], "user": [[key] for key in range(12)]}
WORLD_SIZE = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = collection(table("item", 12), table("user", 12))
        self.dense = nn.Linear(8, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        rows = torch.cat([jagged.values() for jagged in self.embeddings(features).values()])
        return self.dense(rows).sum()


def zeros(options: dict | None = None) -> nn.Module:
    constraints = {name: dynamic(max_capacity=512, initializer_args=ZEROS) for name in IDS}
    return distribute(collection(table("item"), table("user")), constraints, (torch.optim.SGD, {"lr": 1.0}))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    output = model(features_of(BATCH))
    torch.stack([jagged.values().sum() for jagged in output.values()]).sum().backward()
    optimizer.step()


def follow_scheduler(rank: int, world_size: int) -> None:
    model = zeros()
    optimizer = model.fused_optimizer
    assert isinstance(optimizer, KeyedOptimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    total = 0.0
    for _ in range(6):
        rates = scheduler.get_last_lr()
        total += rates[0]
        step(model, optimizer)
        scheduler.step()
    # Powers of two: sums are exact, and so is the comparison.
    assert total == 2.0 - 2.0**-5
    rows = evaluated(model, IDS)
    assert torch.equal(rows["item"], -total * (IDS["item"] % 4).view(-1, 1).expand(-1, 8))
    assert torch.equal(rows["user"], torch.full((12, 8), -total))


def test_scheduler() -> None:
    run_on_ranks(WORLD_SIZE, follow_scheduler)


def change_one_table(rank: int, world_size: int) -> None:
    model = zeros()
    optimizer = model.fused_optimizer
    step(model, optimizer)
    names = {id(parameter): name for name, parameter in optimizer.params.items()}
    for group in optimizer.param_groups:
        if {names[id(parameter)].split(".")[-2] for parameter in group["params"]} == {"user"}:
            group["lr"] = 0.25
    step(model, optimizer)
    rows = evaluated(model, IDS)
    assert torch.equal(rows["item"][3], torch.full((8,), -6.0))
    assert torch.equal(rows["user"], torch.full((12, 8), -1.25))
    # A rate without a step or zero_grad in between waits, as it does for torchrec's own tables.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    step(model, optimizer)
    assert torch.equal(evaluated(model, IDS)["user"], rows["user"])


def test_one_table_alone() -> None:
    run_on_ranks(WORLD_SIZE, change_one_table)


def train_like_torchrec(rank: int, world_size: int) -> tuple[float, bool, list[str], list[str]]:
    """A dense layer, warm-up, row-wise Adagrad: every piece of a usual training loop, on both kinds of tables."""
    names, errors = [], []
    torch.manual_seed(0)
    state = Model().dense.state_dict()
    results = []
    for plain in (False, True):
        module = Model()
        module.dense.load_state_dict(state)
        options = dynamic(max_capacity=512, initializer_args=NORMAL, eval_initializer_args=NORMAL)
        constraints = dict.fromkeys(IDS, STATIC if plain else options)
        module.embeddings.requires_grad_(True)
        model = distribute(module, constraints, (RowWiseAdagrad, {"lr": 0.5, "eps": 1e-8}), plain=plain)
        dense = dict(in_backward_optimizer_filter(model.named_parameters()))
        assert sorted(name.split(".")[-1] for name in dense) == ["bias", "weight"]
        names.append(sorted(model.fused_optimizer.params))
        if plain:
            set_rows(model, results[0][0])
        else:
            results.append([{name: rows.clone() for name, rows in evaluated(model.module.embeddings, IDS).items()}])
        stages = [WarmupStage(WarmupPolicy.LINEAR, 4, 0.1), WarmupStage(WarmupPolicy.POLY, 10, 1.0)]
        fused = WarmupOptimizer(model.fused_optimizer, stages, lr=0.5)
        optimizer = CombinedOptimizer(
            [("fused", fused), ("dense", KeyedOptimizerWrapper(dense, lambda params: torch.optim.SGD(params, lr=0.01)))]
        )
        for _ in range(10):
            optimizer.zero_grad()
            model(features_of(BATCH)).backward()
            optimizer.step()
        trained = evaluated(model.module.embeddings, IDS)
        results.append([trained, model.module.dense.weight.detach()])
    for name, rows in results[-1][0].items():
        errors.append(float((rows - results[1][0][name]).abs().max() / rows.abs().max()))
    changed = all((results[0][0][name] != rows).any() for name, rows in results[1][0].items())
    return max(errors), changed, *names


def set_rows(model: nn.Module, rows_by_table: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        if "embeddings" in key:
            for shard in value.local_shards():
                first = shard.metadata.shard_offsets[0]
                shard.tensor.copy_(rows_by_table[key.split(".")[-2]][first : first + shard.tensor.shape[0]])


def test_warm_up_as_on_torchrec_tables() -> None:
    for error, changed, dynamic_names, static_names in run_on_ranks(WORLD_SIZE, train_like_torchrec):
        assert changed and error < tolerances.TRAINED_ROW_RTOL
        assert dynamic_names == static_names


def optimizer_state(rank: int, world_size: int) -> None:
    model = zeros()
    model.fused_optimizer.param_groups[0]["lr"] = 0.125
    state = model.fused_optimizer.state_dict()
    other = zeros()
    other.fused_optimizer.load_state_dict(state)
    assert set(state) >= {"state"}


def test_state_dict_of_the_optimizer() -> None:
    run_on_ranks(1, optimizer_state)


@pytest.mark.parametrize("learning_rate", [0.0, 1e-3])
def test_rate_of_fused_params(learning_rate: float) -> None:
    run_on_ranks(1, _initial_rate, learning_rate)


def _initial_rate(rank: int, world_size: int, learning_rate: float) -> None:
    options = dynamic(max_capacity=512, initializer_args=ZEROS)
    model = distribute(collection(table("item")), {"item": options}, (torch.optim.SGD, {"lr": learning_rate}))
    assert [group["lr"] for group in model.fused_optimizer.param_groups] == [learning_rate]
    model(features_of({"item": [[1]]}))["item"].values().sum().backward()
    assert torch.equal(evaluated(model, {"item": torch.tensor([1])})["item"], torch.full((1, 8), -learning_rate))
