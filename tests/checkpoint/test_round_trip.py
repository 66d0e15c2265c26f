"""A model that was dumped and loaded goes on exactly as the one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamicemb import DynamicEmbDump, DynamicEmbEvictStrategy, DynamicEmbLoad, incremental_dump
from dynamicemb.shard import get_score, table_statistics
from dynamicemb.shard.tables import dynamic_tables
from tests.checkpoint.models import OPTIMIZERS, contents, model, train
from tests.distributed import run_on_ranks

STRATEGIES = list(DynamicEmbEvictStrategy)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _goes_on(rank: int, world_size: int, folder: str, optimizer: str) -> list[str]:
    """Returns the combinations that do not."""
    wrong = []
    for number, strategy in enumerate(STRATEGIES):
        for dtype in DTYPES:
            case = f"{optimizer}-{strategy.value}-{dtype}"
            arguments: dict[str, Any] = {"optimizer": optimizer, "strategy": strategy, "embedding_dtype": dtype}
            custom = strategy is DynamicEmbEvictStrategy.CUSTOMIZED
            if number == 1:
                arguments["init_capacity"] = 32
            first, path = model(**arguments), f"{folder}/{case}"
            train(first, range(10), rank, world_size, custom)
            DynamicEmbDump(path, first, optim=True)
            second = model(**arguments)
            train(second, range(50, 53), rank, world_size, custom)  # what is there is replaced
            DynamicEmbLoad(path, second, optim=True)
            same = contents(first) == contents(second) and table_statistics(first) == table_statistics(second)
            same &= get_score(first) == get_score(second)
            losses = [train(one, range(10, 30), rank, world_size, custom) for one in (first, second)]
            same &= losses[0] == losses[1] and contents(first) == contents(second)
            same &= table_statistics(first)["t0"].evicted > 0
            wrong += [] if same else [case]
    return wrong


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_goes_on_as_if_it_had_not_stopped(world_size: int, optimizer: str, tmp_path: Path) -> None:
    assert run_on_ranks(world_size, _goes_on, str(tmp_path), optimizer) == [[]] * world_size


def _growing(rank: int, world_size: int, folder: str) -> bool:
    """Buckets that overflow before the table has grown, so that its size does not follow from its rows."""
    arguments: dict[str, Any] = {"capacity": 4096, "init_capacity": 32, "max_load_factor": 0.9}
    first = model(**arguments)
    train(first, range(4), rank, world_size)
    slots = table_statistics(first)["t2"].slots
    DynamicEmbDump(f"{folder}/grown", first, optim=True)
    second = model(**arguments)
    DynamicEmbLoad(f"{folder}/grown", second, optim=True)
    assert table_statistics(second)["t2"].slots == slots < 4096
    losses = [train(one, range(4, 40), rank, world_size) for one in (first, second)]
    return losses[0] == losses[1] and table_statistics(first) == table_statistics(second)


def test_a_table_that_grows_goes_on_growing(tmp_path: Path) -> None:
    assert run_on_ranks(2, _growing, str(tmp_path)) == [True, True]


def _without_optimizer(rank: int, world_size: int, folder: str) -> None:
    first, second = model("adam"), model("adam")
    train(first, range(5), rank, world_size)
    DynamicEmbDump(f"{folder}/rows", first)
    assert not list(Path(folder).rglob("*opt*"))
    train(second, range(3), rank, world_size)
    DynamicEmbLoad(f"{folder}/rows", second)
    for name, rows in contents(second).items():
        expected = contents(first)[name]
        assert {key: row[:2] for key, row in rows.items()} == {key: row[:2] for key, row in expected.items()}
        assert all(not any(state) for row in rows.values() for state in row[2:]), "states begin anew"
    assert all(int(table.group.steps[table.index]) == 0 for table in dynamic_tables(second))


def test_without_optimizer_state_it_begins_anew(tmp_path: Path) -> None:
    run_on_ranks(1, _without_optimizer, str(tmp_path))


def _learning_rate(rank: int, world_size: int, folder: str) -> tuple[float, list[float]]:
    first, second = model("sgd"), model("sgd")
    for group in first.fused_optimizer.param_groups:
        group["lr"] = 0.25
    train(first, range(2), rank, world_size)
    first.fused_optimizer.zero_grad()
    DynamicEmbDump(f"{folder}/lr", first, optim=True)
    DynamicEmbLoad(f"{folder}/lr", second, optim=True)
    table = dynamic_tables(second)[0]
    return float(table.group.hyperparameters[0, 0]), [group["lr"] for group in second.fused_optimizer.param_groups]


def test_the_learning_rate_comes_back(tmp_path: Path) -> None:
    assert run_on_ranks(1, _learning_rate, str(tmp_path)) == [(0.25, [0.25] * 3)]


def _subset(rank: int, world_size: int, folder: str) -> None:
    first, second = model(), model()
    train(first, range(5), rank, world_size)
    names = {"model.embeddings": ["t1"]}
    DynamicEmbDump(f"{folder}/one", first, names, optim=True)
    DynamicEmbLoad(f"{folder}/one", second, names, optim=True)
    assert [len(rows) for rows in contents(second).values()] == [0, len(contents(first)["t1"]), 0]
    assert contents(second)["t1"] == contents(first)["t1"]


def test_some_tables_only(tmp_path: Path) -> None:
    run_on_ranks(2, _subset, str(tmp_path))


def _paths(rank: int, world_size: int, folder: str) -> None:
    module = model()
    for name, one in (("wrapped", module), ("bare", module.module), ("compiled", torch.compile(module))):
        DynamicEmbDump(f"{folder}/{name}", one)
        assert sorted(entry.name for entry in Path(folder, name).iterdir()) == ["manifest.json", "model.embeddings"]
    DynamicEmbDump(f"{folder}/collection", module.module.embeddings)
    assert sorted(entry.name for entry in Path(folder, "collection").iterdir()) == ["manifest.json", "model"]


def test_collections_are_called_the_same_however_the_model_is_wrapped(tmp_path: Path) -> None:
    run_on_ranks(1, _paths, str(tmp_path))


def _nothing(rank: int, world_size: int, folder: str) -> bool:
    first, second = model("adam"), model("adam")
    DynamicEmbDump(f"{folder}/full", first, optim=True)
    incremental_dump(f"{folder}/delta", first, f"{folder}/full", optim=True)
    train(second, range(3), rank, world_size)
    DynamicEmbLoad([f"{folder}/full", f"{folder}/delta"], second, optim=True)
    assert not any(contents(second).values())
    losses = [train(one, range(3), rank, world_size) for one in (first, second)]
    return losses[0] == losses[1] and contents(first) == contents(second)


def test_tables_without_rows(tmp_path: Path) -> None:
    assert run_on_ranks(3, _nothing, str(tmp_path)) == [True] * 3
