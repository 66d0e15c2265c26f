"""The parameters that stand for dynamic tables: writing to them is refused, and everything else goes on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import (
    CheckpointError,
    ConfigError,
    DynamicEmbDump,
    DynamicEmbEvictStrategy,
    DynamicEmbLoad,
    incremental_dump,
)
from dynamicemb.shard import get_score, set_score, table_statistics
from dynamicemb.shard.parameter import TableParameter
from tests.distributed import run_on_ranks
from tests.shard.alone import alone
from tests.shard.models import (
    CPU,
    NORMAL,
    STATIC,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    groups,
    local_table,
    rows,
    table,
    train_step,
)

BATCH = {"a": [[1, 2]], "b": [[2, 3]]}
IDS = {"a": torch.arange(4), "b": torch.arange(4)}
init = nn.init


def without_gradient(write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return torch.no_grad()(write)


def multiply_in_place(parameter: torch.Tensor) -> None:
    parameter *= 2


def assign(parameter: torch.Tensor) -> None:
    parameter[:] = 1.0


def assign_data(parameter: torch.Tensor) -> None:
    parameter.data = torch.ones(3, 8)


WRITES: dict[str, Callable[[Any], Any]] = {
    "uniform": init.uniform_,
    "normal": init.normal_,
    "trunc_normal": init.trunc_normal_,
    "constant": lambda p: init.constant_(p, 1.0),
    "ones": init.ones_,
    "zeros": init.zeros_,
    "eye": init.eye_,
    "xavier_uniform": init.xavier_uniform_,
    "xavier_normal": init.xavier_normal_,
    "kaiming_uniform": init.kaiming_uniform_,
    # These two look at the shape, and do nothing of their own accord.
    "kaiming_normal": init.kaiming_normal_,
    "orthogonal": init.orthogonal_,
    "sparse": lambda p: init.sparse_(p, 0.1),
    "by keyword": lambda p: init.normal_(tensor=p, std=0.1),
    "initialized data": lambda p: init.xavier_uniform_(p.data),
    "kaiming of data": lambda p: init.kaiming_normal_(p.data),
    "data": assign_data,
    "data in place": lambda p: p.data.uniform_(-1, 1),
    "data of data": lambda p: p.data.data.zero_(),
    "copy": lambda p: p.data.copy_(torch.ones(8)),
    "copy of another model": lambda p: p.data.copy_(TableParameter("item", 8, CPU).data),
    "detached": lambda p: p.detach().fill_(1.0),
    "view": lambda p: p.data.view(-1).fill_(1.0),
    "rows": lambda p: p.data[:].fill_(1.0),
    "fill": without_gradient(lambda p: p.fill_(1.0)),
    "operator": without_gradient(multiply_in_place),
    "assigned": without_gradient(assign),
    "out": lambda p: torch.mul(torch.ones(0, 8), 2, out=p.data),
    "for each": without_gradient(lambda p: torch._foreach_mul_([p], 2.0)),
    "function": lambda p: torch.relu_(p.data),
    "moving average": lambda p: p.data.lerp_(torch.ones(0, 8), 0.5),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"table 'item' is dynamic.*initializer_args.*reset_parameters"):
        WRITES[name](TableParameter("item", 8, CPU))


def test_what_is_not_a_write() -> None:
    parameter = TableParameter("item", 8, CPU)
    other = nn.Parameter(torch.ones(2))
    assert isinstance(parameter, nn.Parameter) and parameter.shape == (0, 8) and parameter.is_leaf
    assert not parameter.requires_grad_(False).requires_grad
    parameter.requires_grad = True
    (parameter.pow(2).sum() + other.sum()).backward()
    assert parameter.grad is not None and parameter.grad.shape == (0, 8)
    nn.utils.clip_grad_norm_([parameter, other], 1.0)
    parameter.grad = None
    torch.optim.Adam([parameter, other], weight_decay=0.1).step()
    assert nn.utils.parameters_to_vector([parameter, other]).shape == (2,)
    assert torch.zeros(0, 8).add_(parameter.data).shape == (0, 8)
    parameter.share_memory_()
    with torch.no_grad():
        parameter.copy_(parameter)
    copied = copy.deepcopy([parameter, parameter])
    assert copied[0] is copied[1] is not parameter and "item" in repr(copied[0]) and type(copied[0]) is TableParameter
    saved = io.BytesIO()
    torch.save({"weight": parameter}, saved)
    saved.seek(0)
    for loaded in (torch.load(saved, weights_only=True)["weight"], pickle.loads(pickle.dumps(parameter))):
        assert type(loaded) is nn.Parameter and loaded.shape == (0, 8) and loaded.requires_grad
    parameter.requires_grad_(False)
    for frozen in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert not frozen.requires_grad


def test_modules_go_on_with_it() -> None:
    model = alone("a", "b")
    train_step(model, features_of(BATCH))
    before = evaluated(model, IDS)
    parameters = list(model.parameters())
    for change in (
        lambda: model.to(CPU),
        lambda: model.to(torch.float64),
        lambda: model.float(),
        lambda: model.zero_grad(),
        lambda: model.requires_grad_(True),
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.load_state_dict(model.state_dict(), assign=True),
    ):
        change()
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(before[name], values) for name, values in evaluated(model, IDS).items())
    assert len(model.state_dict()) > len(parameters) and "a" in repr(model)


def weight_of(module: nn.Module) -> None:
    if isinstance(getattr(module, "weight", None), torch.Tensor):
        init.normal_(module.weight)


INITIALIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "apply": lambda model: model.apply(weight_of),
    "matrices": lambda model: [init.xavier_uniform_(p) for p in model.parameters() if p.dim() > 1],
    "named data": lambda model: [p.data.uniform_(-0.1, 0.1) for _, p in model.named_parameters()],
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).update_parameters(model),
}


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_initialization_of_a_model(name: str) -> None:
    model = alone("a", "b")
    train_step(model, features_of(BATCH))
    before = evaluated(model, IDS)
    with pytest.raises(ConfigError, match="table 'a' is dynamic"):
        INITIALIZATIONS[name](model)
    assert all(torch.equal(before[name], values) for name, values in evaluated(model, IDS).items())


def test_a_copy_has_memory_of_its_own() -> None:
    """Also of tables that have grown, and of what their changes are noted in."""
    model = alone("a", "b", init_capacity=128, max_capacity=1024, evict_strategy=DynamicEmbEvictStrategy.LFU)
    groups(model)[0].changes.begin()
    train_step(model, features_of({"a": [list(range(200))], "b": [[2, 3]]}))
    copied = copy.deepcopy(model)
    before = evaluated(model, IDS)
    for _ in range(2):
        train_step(copied, features_of({"a": [list(range(1, 400))], "b": [[2, 3]]}))
    assert all(torch.equal(before[name], values) for name, values in evaluated(model, IDS).items())
    assert evaluated(copied, IDS)["a"][:, 0].tolist() == [-1.0, -3.0, -3.0, -3.0]
    assert table_statistics(copied)["a"].size == 400 and table_statistics(model)["a"].size == 200
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    assert not any(jagged.values().requires_grad for jagged in copied(features_of(BATCH)).values())
    train_step(model, features_of(BATCH))
    assert evaluated(model, IDS)["a"][:, 0].tolist() == [-1.0, -2.0, -2.0, -1.0]


# ------------------------------------------------------------------------------------------- reset_parameters


@pytest.mark.parametrize("strategy", DynamicEmbEvictStrategy)
def test_reset_parameters(strategy: DynamicEmbEvictStrategy) -> None:
    """Training after it is that of a new collection, to the bit, with what was set by hand."""
    options: dict[str, Any] = {
        "evict_strategy": strategy, "initializer_args": NORMAL, "init_capacity": 128, "max_capacity": 512
    }  # fmt: skip
    model, new = (alone("a", "b", **options) for _ in range(2))
    groups(model)[0].changes.begin()
    batches = [features_of({"a": [list(range(first, first + 400))], "b": [[2, 3]]}) for first in (0, 300)]
    for batch in batches:
        train_step(model, batch)
    for either in (model, new):
        if strategy is DynamicEmbEvictStrategy.CUSTOMIZED:
            set_score(either, 7)
        for group in either.fused_optimizer.param_groups:
            group["lr"] = 0.5
        either.fused_optimizer.step()
    assert table_statistics(model)["a"].evicted > 0
    model.reset_parameters()
    for batch in [*batches, batches[0]]:
        assert table_statistics(model) == table_statistics(new) and get_score(model) == get_score(new)
        for name in ("a", "b"):
            (one, index), (other, _) = local_table(model, name), local_table(new, name)
            assert one.progress(index) == other.progress(index)
            assert one.storage.geometries == other.storage.geometries
            assert all(
                torch.equal(getattr(one.stored_rows(index), part), getattr(other.stored_rows(index), part))
                for part in ("keys", "slots", "scores", "embeddings")
            )
        train_step(model, batch)
        train_step(new, batch)


def test_no_delta_across_a_reset(tmp_path: Path) -> None:
    """The steps begin again, so those of a checkpoint from before say nothing any more."""
    model = alone("a", "b")
    train_step(model, features_of(BATCH))
    DynamicEmbDump(tmp_path / "before", model)
    model.reset_parameters()
    for _ in range(2):
        train_step(model, features_of({"a": [[5]], "b": [[6]]}))
    with pytest.raises(CheckpointError, match="has not been in this state"):
        incremental_dump(tmp_path / "delta", model, since=tmp_path / "before")
    DynamicEmbDump(tmp_path / "after", model)
    train_step(model, features_of(BATCH))
    incremental_dump(tmp_path / "delta", model, since=tmp_path / "after")
    loaded = alone("a", "b")
    DynamicEmbLoad([tmp_path / "after", tmp_path / "delta"], loaded)
    for name in ("a", "b"):
        (one, index), (other, _) = local_table(model, name), local_table(loaded, name)
        assert torch.equal(one.stored_rows(index).embeddings, other.stored_rows(index).embeddings)


def reset_on_ranks(rank: int, world_size: int) -> None:
    """Beside a static table, which gets new first values, and between a lookup and its update."""
    constraints = {"a": dynamic(initializer_args=NORMAL, max_capacity=512), "b": STATIC}
    model = distribute(collection(*map(table, constraints)), constraints, (torch.optim.SGD, {"lr": 1.0}))
    first = train_step(model, features_of(BATCH))
    static = evaluated(model, IDS)["b"]
    late = rows(model, features_of(BATCH))["a"]
    model.module.reset_parameters()
    late.sum().backward()
    assert table_statistics(model)["a"].size == 0
    assert not evaluated(model, IDS)["a"].any() and not torch.equal(evaluated(model, IDS)["b"], static)
    assert torch.equal(train_step(model, features_of(BATCH))["a"], first["a"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_reset_on_ranks(world_size: int) -> None:
    run_on_ranks(world_size, reset_on_ranks)
