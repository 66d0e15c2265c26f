"""One seed, one table: whatever the run, the number of ranks, and the order in which ids come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.options import EMBEDDING_DTYPES
from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    NORMAL,
    collection,
    distribute,
    dynamic,
    evaluated,
    groups,
    one_sample,
    rows,
    table,
    train_step,
)

DIM = 8
#: More than one owner's range at any world size, and the places where arithmetic on keys would go wrong.
KEYS = torch.cat([torch.arange(-40, 40) * 97, torch.tensor([-(2**63), 2**63 - 1, 2**40])])


# ------------------------------------------------------------------------------------------- whole runs


def train(rank: int, world_size: int) -> list[dict[str, Any]]:
    """With growth, evictions and refused keys; returns every byte of this rank's tables."""
    options: dict[str, Any] = {"max_capacity": 96, "bucket_capacity": 16, "initializer_args": NORMAL}
    constraints = {
        "lru": dynamic(init_capacity=16, **options),
        "lfu": dynamic(evict_strategy=DynamicEmbEvictStrategy.LFU, **options),
    }
    optimizer = (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8})
    model = distribute(collection(table("lru"), table("lfu")), constraints, optimizer)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(30):
        ids = (torch.rand(2, 120, generator=generator) ** 3 * 600).long()
        output = rows(model, one_sample({"lru": ids[0], "lfu": ids[1]}))
        torch.stack([values.sin().sum() for values in output.values()]).sum().backward()
    assert all(entry.evicted > 50 for entry in table_statistics(model).values())
    return [vars(group.stored_rows(index)) for group in groups(model) for index in range(len(group.configs))]


def test_two_runs_are_identical() -> None:
    for first_rank, second_rank in zip(run_on_ranks(2, train), run_on_ranks(2, train)):
        for first, second in zip(first_rank, second_rank, strict=True):
            for name in ("keys", "slots", "scores", "embeddings"):
                assert torch.equal(first[name], second[name]), name
            assert torch.equal(first["states"]["sum"], second["states"]["sum"])
            assert first["keys"].numel() > 40


# ------------------------------------------------------------------------------------------- first values


def initializer_options() -> dict[str, dict[str, Any]]:
    """Every distribution in every dtype, in one model."""
    return {
        f"{mode.value}_{str(dtype).removeprefix('torch.')}": {
            "initializer_args": DynamicEmbInitializerArgs(mode=mode, mean=0.25, std_dev=2.0, value=-0.75),
            "embedding_dtype": dtype,
        }
        for mode in DynamicEmbInitializerMode
        for dtype in EMBEDDING_DTYPES
    }


def model_of(options: dict[str, dict[str, Any]]) -> nn.Module:
    tables = [table(name, 10_000, DIM) for name in options]
    constraints = {name: dynamic(max_capacity=2048, **arguments) for name, arguments in options.items()}
    return distribute(collection(*tables), constraints, (torch.optim.SGD, {"lr": 0.5}))


def first_rows(rank: int, world_size: int, options: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What training reads for KEYS the first time; each rank brings them in another order."""
    model = model_of(options)
    order = torch.randperm(KEYS.numel(), generator=torch.Generator().manual_seed(rank))
    output = train_step(model, one_sample(dict.fromkeys(options, KEYS[order])))
    return {name: values[order.argsort()] for name, values in output.items()}


@pytest.fixture(scope="module")
def by_world_size() -> dict[int, list[dict[str, torch.Tensor]]]:
    return {size: run_on_ranks(size, first_rows, initializer_options()) for size in (1, 2, 4)}


@pytest.mark.parametrize("name", list(initializer_options()))
def test_first_values_are_the_same_on_any_number_of_ranks(by_world_size: dict, name: str) -> None:
    expected = by_world_size[1][0][name]
    assert expected.shape == (KEYS.numel(), DIM) and expected.any(1).sum() >= KEYS.numel() - 1
    for results in by_world_size.values():
        assert all(torch.equal(expected, result[name]) for result in results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", [DynamicEmbInitializerMode.CONSTANT, DynamicEmbInitializerMode.DEBUG])
def test_simple_modes(by_world_size: dict, mode: DynamicEmbInitializerMode, dtype: str) -> None:
    seen = by_world_size[2][1]
    constant = mode is DynamicEmbInitializerMode.CONSTANT
    values = [-0.75 if constant else float(key % 100_000) for key in KEYS.tolist()]
    expected = torch.tensor(values).view(-1, 1).expand(-1, DIM)
    assert torch.equal(seen[f"{mode.value}_float32"], expected)
    assert torch.equal(seen[f"{mode.value}_{dtype}"], expected.to(getattr(torch, dtype)).float())


def test_random_modes_have_their_shape(by_world_size: dict) -> None:
    seen = by_world_size[4][0]
    assert seen["normal_float32"].mean() == pytest.approx(0.25, abs=0.3)
    assert seen["normal_float32"].std() == pytest.approx(2.0, abs=0.3)
    assert seen["normal_float32"].abs().max() > 4.25, "not cut off"
    truncated = seen["truncated_normal_float32"] - 0.25
    assert truncated.abs().max() <= 4.0 and truncated.abs().max() > 3.5, "cut off at two standard deviations"
    uniform = seen["uniform_float32"]
    # The default bounds: plus and minus sqrt(1 / num_embeddings) of the whole table, whatever the number of ranks.
    assert 0.0095 < uniform.abs().max() <= 0.01 and uniform.abs().mean() == pytest.approx(0.005, abs=0.0005)


def test_tables_seeds_keys_and_columns_differ() -> None:
    options = {name: {"initializer_args": NORMAL, "seed": 0} for name in ("a", "b")}
    base = run_on_ranks(1, first_rows, options)[0]
    other_seed = run_on_ranks(1, first_rows, {"a": {**options["a"], "seed": 1}, "b": options["b"]})[0]
    alone = run_on_ranks(1, first_rows, {"a": options["a"]})[0]
    assert not (base["a"] == base["b"]).any()
    assert not (base["a"] == other_seed["a"]).any()
    assert torch.equal(base["b"], other_seed["b"])
    assert torch.equal(base["a"], alone["a"]), "other tables have no part in it"
    assert base["a"].unique().numel() == base["a"].numel()


def return_after_eviction(rank: int, world_size: int) -> None:
    options = {"initializer_args": NORMAL, "eval_initializer_args": NORMAL, "max_capacity": 8, "bucket_capacity": 8}
    model = distribute(collection(table("item")), {"item": dynamic(**options)}, (torch.optim.SGD, {"lr": 0.5}))
    promised = evaluated(model, {"item": torch.arange(8)})["item"]
    first = train_step(model, one_sample({"item": torch.arange(8)}))["item"]
    train_step(model, one_sample({"item": torch.arange(100, 108)}))
    again = train_step(model, one_sample({"item": torch.arange(8)}))["item"]
    assert table_statistics(model)["item"].evicted == 16
    assert torch.equal(first, promised) and torch.equal(first, again)


def test_evicted_rows_begin_again_as_they_began() -> None:
    run_on_ranks(1, return_after_eviction)
