"""Lookups as parts of a graph: what they keep for the way back, and passes that are not the usual one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.distributed import run_on_ranks
from tests.shard.alone import alone
from tests.shard.models import (
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

BATCH = {"a": [[1, 2, 2]], "b": [[2, 3]]}
IDS = {"a": torch.arange(4), "b": torch.arange(4)}


def loss_of(model: nn.Module) -> torch.Tensor:
    return torch.stack([values.sum() for values in rows(model, features_of(BATCH)).values()]).sum()


def first_columns(model: nn.Module) -> dict[str, list[float]]:
    return {name: values[:, 0].tolist() for name, values in evaluated(model, IDS).items()}


def test_second_pass() -> None:
    """Raises autograd's own error and updates nothing, unless the graph is retained: then it is a second update."""
    model = alone("a", "b")
    loss = loss_of(model)
    loss.backward()
    once = {"a": [0.0, -1.0, -2.0, 0.0], "b": [0.0, 0.0, -1.0, -1.0]}
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert first_columns(model) == once and groups(model)[0].steps.tolist() == [1, 1]
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    assert first_columns(model) == {name: [3 * value for value in values] for name, values in once.items()}
    assert groups(model)[0].steps.tolist() == [3, 3]


def on_ranks(rank: int, world_size: int, static: bool) -> list[Any]:
    """The same with rows that travel; what torchrec's own tables do, beside it."""
    options = STATIC if static else dynamic(initializer_args=ZEROS, max_capacity=512)
    constraints = dict.fromkeys(BATCH, options)
    model = distribute(collection(*map(table, constraints)), constraints, (torch.optim.SGD, {"lr": 1.0}), plain=static)
    before, results = evaluated(model, IDS), []

    def note() -> None:
        now = evaluated(model, IDS)
        results.append({name: [round(float((now[name] - before[name])[i, 0])) for i in range(4)] for name in IDS})

    loss = loss_of(model)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    note()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    note()
    model.eval()
    output = rows(model, features_of(BATCH))
    assert all(values.requires_grad for values in output.values())
    loss = torch.stack([(number * values).sum() for number, values in enumerate(output.values(), 2)]).sum()
    results += [gradient.tolist() for gradient in torch.autograd.grad(loss, list(output.values()), retain_graph=True)]
    note()
    return results


def test_as_torchrec_tables_on_ranks() -> None:
    ours, theirs = (run_on_ranks(2, on_ranks, static) for static in (False, True))
    assert ours == theirs


# ------------------------------------------------------------------------------------------- memory


def live_tensors() -> int:
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


def growth(step: Callable[[], None]) -> int:
    """Tensors that four steps leave behind, for the garbage collector too, which comes late and costs time."""
    step()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(4):
            step()
        return live_tensors() - before
    finally:
        gc.enable()


def adding_up(model: nn.Module, losses: list[torch.Tensor]) -> Callable[[], None]:
    """A step whose loss is kept in a sum."""
    losses.append(torch.zeros(()))

    def step() -> None:
        loss = loss_of(model)
        loss.backward()
        losses[0] = losses[0] + loss

    return step


def test_buffers_live_as_long_as_they_are_needed() -> None:
    model, kept = alone("a", "b"), []
    assert growth(adding_up(model, kept)) == 0
    assert growth(lambda: kept.append(loss_of(model))) > 20, "this is where they would be seen"
    kept.clear()
    assert growth(lambda: loss_of(model).detach_()) == 0, "a lookup that has no backward pass leaves nothing behind"


def buffers_on_ranks(rank: int, world_size: int) -> list[int]:
    constraints = {name: dynamic(initializer_args=ZEROS, max_capacity=512) for name in BATCH}
    model = distribute(collection(*map(table, constraints)), constraints, (torch.optim.SGD, {"lr": 1.0}))
    # Nobody goes back, nobody even waits for the rows, a loss is kept.
    return [
        growth(lambda: loss_of(model).detach_()),
        growth(lambda: model(features_of(BATCH)) and None),
        growth(adding_up(model, [])),
    ]


@pytest.mark.slow
def test_buffers_of_rows_that_travel() -> None:
    """gloo's thread may still have the tensors of the last collectives; those of four steps would be forty and more."""
    for counts in run_on_ranks(2, buffers_on_ranks):
        assert max(counts) < 30


# ------------------------------------------------------------------------------------------- other passes


def penalized(model: nn.Module) -> None:
    output = rows(model, features_of(BATCH))["a"]
    [gradient] = torch.autograd.grad((output**2).sum(), output, create_graph=True)
    gradient.sum().backward()  # twice the rows: the gradient of each is 2


def with_graph_of_the_pass(model: nn.Module) -> None:
    loss_of(model).backward(create_graph=True)


def recomputed(model: nn.Module) -> None:
    """Activation checkpointing looks the batch up again; the update takes what the second lookup found."""
    checkpoint(loss_of, model, use_reentrant=False).backward()


def kept_elsewhere(model: nn.Module) -> None:
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (packed.append(tensor), tensor.clone())[1], lambda tensor: tensor
    ):
        loss = loss_of(model)
    assert {tensor.dtype for tensor in packed} >= {torch.int64, torch.int32}, "hooks see what a lookup saves"
    loss.backward()


@pytest.mark.parametrize(
    ("go_back", "expected"),
    [(penalized, [-2.0, -4.0]), (with_graph_of_the_pass, [-1.0, -2.0]), (recomputed, [-1.0, -2.0]),
     (kept_elsewhere, [-1.0, -2.0])],
)  # fmt: skip
def test_other_ways_back(go_back: Callable[[nn.Module], None], expected: list[float]) -> None:
    model = alone("a", "b")
    go_back(model)
    assert first_columns(model)["a"] == [0.0, *expected, 0.0]
    assert groups(model)[0].steps.tolist() == [1, 1]


def test_an_update_cannot_be_differentiated() -> None:
    """Where a graph of the way back would lead through the sum of equal ids' gradients, there is an error."""
    from dynamicemb.kernels.dedup import dedup
    from dynamicemb.table.function import expand

    keys = torch.tensor([1, 1, 2])
    unique = dedup(keys, torch.zeros(3, dtype=torch.int32), 1, 1)
    values = torch.ones(2, 4, requires_grad=True)
    [gradient] = torch.autograd.grad((expand(values, unique) ** 2).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_graph_where_there_is_no_gradient() -> None:
    model = alone("a", "b")
    for context in (torch.no_grad(), torch.inference_mode()):
        for mode in (True, False):
            model.train(mode)
            with context:
                assert not any(values.requires_grad for values in rows(model, one_sample(IDS)).values())
