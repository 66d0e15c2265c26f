"""Nothing that a table keeps depends on the mode in which it was first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import DynamicEmbDump, DynamicEmbEvictStrategy, DynamicEmbLoad, incremental_dump
from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.shard.alone import alone
from tests.shard.models import (
    NORMAL,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    local_table,
    rows,
    table,
    train_step,
)


def tensors_of(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from ``thing`` through containers and this package's objects."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_of(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from tensors_of(value, seen)
    elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("dynamicemb"):
        yield from tensors_of(vars(thing), seen)


def batch(first: int) -> Any:
    """Its features are not in the order of the tables."""
    return features_of({"b": [[2, 3]], "a": [list(range(first, first + 300))]})


LIVES: dict[str, Callable[[nn.Module, Path, Callable[[], Any]], None]] = {}


def life(function: Callable[[nn.Module, Path, Callable[[], Any]], None]) -> None:
    LIVES[function.__name__] = function


@life
def first_step(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    with mode():
        rows(model, batch(0))


@life
def after_a_dump(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    train_step(model, batch(0))
    DynamicEmbDump(folder / "full", model)
    with mode():
        rows(model, batch(200))  # grows, evicts, and notes it


@life
def after_loading(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    train_step(model, batch(0))
    with mode():
        DynamicEmbDump(folder / "full", model)
        rows(model, batch(1000))
        DynamicEmbLoad(folder / "full", model)
        rows(model, batch(200))


@life
def after_a_state_dict(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    train_step(model, batch(0))
    with mode():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        rows(model, batch(1000))
        model.load_state_dict(state)


@life
def after_a_reset(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    train_step(model, batch(0))
    with mode():
        model.reset_parameters()
        rows(model, batch(200))


@life
def in_evaluation(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    with mode():
        model.eval()
        rows(model, batch(0))
        model.train()


@life
def hyperparameters(model: nn.Module, folder: Path, mode: Callable[[], Any]) -> None:
    with mode():
        for group in model.fused_optimizer.param_groups:
            group["lr"] = 0.25
        model.fused_optimizer.step()


@pytest.mark.parametrize("strategy", [DynamicEmbEvictStrategy.LRU, DynamicEmbEvictStrategy.LFU])
@pytest.mark.parametrize("name", LIVES)
def test_training_goes_on(name: str, strategy: DynamicEmbEvictStrategy, tmp_path: Path) -> None:
    """As it would have without the mode, to the bit, and so does what is noted for a delta."""
    states = []
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        folder = tmp_path / mode.__name__
        folder.mkdir()
        model = alone("a", "b", initializer_args=NORMAL, init_capacity=128, max_capacity=512, evict_strategy=strategy)
        LIVES[name](model, folder, mode)
        kept = list(tensors_of([model], set()))
        assert len(kept) > 20 and not any(tensor.is_inference() for tensor in kept)
        for first in (100, 400):
            train_step(model, batch(first))
        DynamicEmbDump(folder / "now", model)
        train_step(model, batch(700))
        incremental_dump(folder / "delta", model, since=folder / "now")
        group, index = local_table(model, "a")
        stored = group.stored_rows(index)
        states.append([stored.keys, stored.scores, stored.embeddings, table_statistics(model)])
    for other in states[1:]:
        assert all(torch.equal(*pair) for pair in zip(states[0][:3], other)) and states[0][3] == other[3]


def frozen_in_a_mode() -> None:
    model = alone("a", "b")
    [first, _] = model.parameters()
    with torch.inference_mode():
        first.requires_grad_(False)
        rows(model, batch(0))
    train_step(model, batch(0))
    first.requires_grad_(True)
    train_step(model, batch(0))
    assert evaluated(model, {"a": torch.tensor([1]), "b": torch.tensor([2])})["a"][0, 0] == -1.0


def test_freezing() -> None:
    frozen_in_a_mode()


def first_batch(rank: int, world_size: int) -> list[int]:
    """For it torchrec makes its distributions. (Its own tables cannot be read in inference mode on a CPU.)"""
    constraints = dict.fromkeys("ab", dynamic(initializer_args=NORMAL, max_capacity=512))
    model = distribute(collection(*map(table, constraints)), constraints, (torch.optim.SGD, {"lr": 1.0}))
    with torch.inference_mode():
        rows(model, batch(rank))
    kept = list(tensors_of([model.module.dynamic_lookup, model.module._input_dists[-1]], set()))
    assert len(kept) > 20 and not any(tensor.is_inference() for tensor in kept)
    train_step(model, batch(rank))
    return [int(group.clock[0]) for group in model.module.dynamic_lookup.groups]


def test_on_ranks() -> None:
    assert run_on_ranks(2, first_batch) == [[2], [2]]
