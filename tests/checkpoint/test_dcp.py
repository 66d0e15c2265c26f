"""Models with dynamic tables in ``torch.distributed.checkpoint``: saved at W ranks, also in between, loaded at V."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from dynamicemb import CheckpointError, DynamicEmbError, DynamicEmbEvictStrategy, DynamicEmbWarning
from dynamicemb.checkpoint.dcp import load, sized_state_dict
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.shard import get_score, sharded_rows, table_statistics
from tests.checkpoint.models import OPTIMIZERS, Model, contents, joined, model, train
from tests.distributed import run_on_ranks
from tests.oracle import owner
from tests.shard.alone import alone, no_process_group
from tests.shard.models import STATIC, collection, distribute, dynamic, evaluated, features_of, one_sample, table

SIZES = (1, 2, 3, 4)
#: Of models with static tables: fbgemm has no Adam on the CPU.
SGD = (torch.optim.SGD, {"lr": 0.5})


def _save(rank: int, world_size: int, folder: str) -> Any:
    module = model("adam", capacity=8192)
    train(module, range(6), rank, world_size)
    dcp.save({"model": module.state_dict(), "step": 6}, checkpoint_id=f"{folder}/from{world_size}")
    return contents(module), table_statistics(module), get_score(module)


def _load(rank: int, world_size: int, folder: str) -> Any:
    loaded = []
    for size in SIZES:
        module = model("adam", capacity=8192)
        train(module, range(50, 52), rank, world_size)
        load(module, f"{folder}/from{size}", prefix="model.")
        loaded.append((contents(module), table_statistics(module), get_score(module)))
        assert all(owner(key, world_size) == rank for rows in contents(module).values() for key in rows)
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dcp")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[int, list[Any]]:
    return {size: run_on_ranks(size, _save, str(folder)) for size in SIZES}


@pytest.mark.parametrize("world_size", SIZES)
def test_saved_at_any_number_of_ranks_and_loaded_at_any_other(
    world_size: int, folder: Path, saved: dict[int, list[Any]]
) -> None:
    results = run_on_ranks(world_size, _load, str(folder))
    for number, size in enumerate(SIZES):
        rows, statistics, scores = zip(*(result[number] for result in results), strict=True)
        _, expected_statistics, expected_scores = saved[size][0]
        assert joined(list(rows)) == joined([result[0] for result in saved[size]])
        assert len(joined(list(rows))["t0"]) > 200
        for name, statistic in statistics[0].items():
            other = expected_statistics[name]
            assert (statistic.size, statistic.hits, statistic.misses) == (other.size, other.hits, other.misses)
        assert all(score == expected_scores for score in scores)


def test_the_checkpoint_does_not_depend_on_the_number_of_ranks(folder: Path, saved: dict[int, list[Any]]) -> None:
    """Names, shapes and dtypes are the same where the rows are, and are what the documentation says."""
    entries = {}
    for size in SIZES:
        metadata = FileSystemReader(folder / f"from{size}").read_metadata().state_dict_metadata
        entries[size] = {
            name: (str(entry.properties.dtype), tuple(entry.size)[1:])
            for name, entry in metadata.items()
            if name.startswith("model.embeddings.embeddings.t1.")
        }
        rows = len(joined([result[0] for result in saved[size]])["t1"])
        assert metadata["model.embeddings.embeddings.t1.keys"].size == torch.Size([rows])
    start = "model.embeddings.embeddings.t1."
    assert entries[1] == {
        start + "keys": ("torch.int64", ()),
        start + "scores": ("torch.int64", ()),
        start + "weight": ("torch.float32", (8,)),
        start + "optimizer.exp_avg": ("torch.float32", (8,)),
        start + "optimizer.exp_avg_sq": ("torch.float32", (8,)),
        start + "progress": ("torch.int64", ()),
        start + "hyperparameters": ("torch.float64", ()),
        start + "slots": ("torch.int64", ()),
        start + "config": ("torch.int64", ()),
    }
    assert entries[1] == entries[2] == entries[3] == entries[4]


# ---------------------------------------------------------------------------------------------------- going on


def _goes_on(rank: int, world_size: int, folder: str) -> list[str]:
    """Every optimizer, dtype and strategy at least once; returns the cases that do not go on as before."""
    group = dist.new_group(backend="gloo")
    wrong = []
    assert set(OPTIMIZERS) == {kind.name.lower() for kind in OptimizerKind}
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    for optimizer, dtype, strategy in zip([*OPTIMIZERS, "adam"], dtypes, itertools.cycle(DynamicEmbEvictStrategy)):
        arguments: dict[str, Any] = {"optimizer": optimizer, "strategy": strategy, "embedding_dtype": dtype}
        custom = strategy is DynamicEmbEvictStrategy.CUSTOMIZED
        case, init = f"{optimizer}-{strategy.value}-{dtype}", {"init_capacity": 32}
        first = model(**arguments, **init)
        train(first, range(10), rank, world_size, custom)
        before, path = contents(first), f"{folder}/{case}"
        future = dcp.async_save(first.state_dict(), checkpoint_id=path, process_group=group)
        losses = [train(first, range(10, 25), rank, world_size, custom)]
        future.result()
        second = model(**arguments, **init)
        train(second, range(50, 53), rank, world_size, custom)
        load(second, path)
        same = contents(second) == before
        losses.append(train(second, range(10, 25), rank, world_size, custom))
        same &= losses[0] == losses[1] and contents(first) == contents(second)
        same &= table_statistics(first) == table_statistics(second) and get_score(first) == get_score(second)
        same &= table_statistics(first)["t0"].evicted > 0
        wrong += [] if same else [case]
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_saved_while_training_goes_on_and_loaded_it_goes_on_the_same(world_size: int, tmp_path: Path) -> None:
    """What an asynchronous save writes is what was there when ``state_dict`` was called."""
    assert run_on_ranks(world_size, _goes_on, str(tmp_path)) == [[]] * world_size


def _mixed() -> nn.Module:
    constraints = {"t0": dynamic(bucket_capacity=16), "t1": STATIC}
    return distribute(Model(collection(table("t0", 500), table("t1", 500))), constraints, SGD)


def _with_static_tables(rank: int, world_size: int, folder: str) -> None:
    ids = {"t0": torch.arange(40), "t1": torch.arange(40)}
    first, second = _mixed(), _mixed()

    def step(module: nn.Module) -> None:
        module(one_sample(ids)).backward()

    step(first)
    expected = evaluated(first.module.embeddings, ids)
    group = dist.new_group(backend="gloo")
    future = dcp.async_save({"model": first.state_dict()}, checkpoint_id=folder, process_group=group)
    step(first)
    future.result()
    load(second, folder, prefix="model.")
    result = evaluated(second.module.embeddings, ids)
    assert all(expected[name].any() and torch.equal(result[name], expected[name]) for name in ids)
    assert not torch.equal(evaluated(first.module.embeddings, ids)["t1"], expected["t1"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_static_tables_beside_dynamic_ones_are_saved_as_well(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _with_static_tables, str(tmp_path))


# ---------------------------------------------------------------------------------------------------- shapes


def _few_rows(rank: int, world_size: int, folder: str) -> None:
    """No rows at all, and rows that only one rank owns; shards of two rows, so that boundaries are everywhere."""
    sharded_rows._SHARD_ROWS = 2
    for case, keys in enumerate(([], _keys_of(world_size - 1, world_size, 5), _keys_of(0, world_size, 5))):
        first, second = model("adagrad", tables=1), model("adagrad", tables=1)
        if keys:
            first.module.embeddings(_features(keys))
        train(second, range(2), rank, world_size)
        dcp.save(first.state_dict(), checkpoint_id=f"{folder}/{case}")
        load(second, f"{folder}/{case}")
        assert contents(second) == contents(first)
        assert len(contents(first)["t0"]) == sum(owner(key, world_size) == rank for key in keys)


def _keys_of(rank: int, world_size: int, count: int) -> list[int]:
    return [key for key in range(1000) if owner(key, world_size) == rank][:count]


def _features(keys: list[int]) -> Any:
    return features_of({"t0": [keys]})


@pytest.mark.parametrize("world_size", [1, 3])
def test_tables_with_few_rows_or_none(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _few_rows, str(tmp_path))


def _without_group(rank: int, world_size: int, folder: str) -> None:
    """A single process without a process group, and a checkpoint that is loaded by one that has one."""
    with no_process_group():
        first, second = alone(), alone()
        first(features_of({"t0": [[1, 2, 5]]})).wait()["t0"].values().sum().backward()
        dcp.save(first.state_dict(), checkpoint_id=folder)
        load(second, folder)
        assert contents(first) == contents(second) and len(contents(first)["t0"]) == 3
    third = distribute(collection(table("t0")), {"t0": dynamic()}, SGD)
    load(third, folder)
    assert contents(first) == contents(third)


def test_a_single_process_without_a_group(tmp_path: Path) -> None:
    run_on_ranks(1, _without_group, str(tmp_path))


def _some_ranks(rank: int, world_size: int, folder: str) -> None:
    """The tables are on two of three ranks; the third takes part in nothing."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    first, second = (distribute(collection(table("t0")), {"t0": dynamic()}, SGD, group=group) for _ in range(2))
    first(features_of({"t0": [list(range(rank, 30))]}))["t0"].values().sum().backward()
    dcp.save(first.state_dict(), checkpoint_id=folder, process_group=group)
    load(second, folder, process_group=group)
    assert contents(first) == contents(second) and len(contents(first)["t0"]) > 5


def test_tables_on_some_of_the_ranks(tmp_path: Path) -> None:
    run_on_ranks(3, _some_ranks, str(tmp_path))


def _optimizer(rank: int, world_size: int, folder: str) -> None:
    """The fused optimizer's own state dict goes into the checkpoint as well, and comes back."""
    first, second = model(), model()
    for group in first.fused_optimizer.param_groups:
        group["lr"] = 0.25
    train(first, range(3), rank, world_size)
    first.fused_optimizer.step()
    saved = {"model": first.state_dict(), "optimizer": first.fused_optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=folder)
    load(second, folder, prefix="model.")
    assert [group["lr"] for group in second.fused_optimizer.param_groups] == [0.25] * 3
    third = model()
    state = {
        "model": sized_state_dict(third, folder, prefix="model."),
        "optimizer": third.fused_optimizer.state_dict(),
    }
    dcp.load(state, checkpoint_id=folder)
    third.load_state_dict(state["model"])
    third.fused_optimizer.load_state_dict(state["optimizer"])
    assert not state["optimizer"]["state"], "optimizer state of rows is in the state dict of the model"
    for one in (first, second, third):
        train(one, range(3, 5), rank, world_size)
        one.fused_optimizer.step()
    assert contents(first) == contents(second) == contents(third)


def test_beside_the_state_of_the_optimizer(tmp_path: Path) -> None:
    run_on_ranks(2, _optimizer, str(tmp_path))


def _part_of_a_dict(rank: int, world_size: int, folder: str) -> None:
    """As in the documentation: the model is one of several things in the checkpoint."""
    first, second = model(), model()
    train(first, range(4), rank, world_size)
    dcp.save({"model": first.state_dict(), "step": 4, "other": {"x": torch.arange(3)}}, checkpoint_id=folder)
    state = {
        "model": sized_state_dict(second, folder, prefix="model."),
        "step": 0,
        "other": {"x": torch.zeros(3, dtype=torch.int64)},
    }
    dcp.load(state, checkpoint_id=folder)
    assert state["step"] == 4 and state["other"]["x"].tolist() == [0, 1, 2]
    assert contents(second) == {"t0": {}, "t1": {}, "t2": {}}
    second.load_state_dict(state["model"])
    assert contents(first) == contents(second)
    bare = model()
    load(bare.module, folder, prefix="model.")
    assert contents(first) == contents(bare)


def test_the_model_is_a_part_of_the_checkpoint(tmp_path: Path) -> None:
    run_on_ranks(2, _part_of_a_dict, str(tmp_path))


def _in_place(rank: int, world_size: int, folder: str) -> None:
    """DCP's own way works where the tables have the same rows, and says what to do where they have not."""
    first = model()
    train(first, range(4), rank, world_size)
    dcp.save(first.state_dict(), checkpoint_id=folder)
    before = contents(first)
    state = first.state_dict()
    for value in state.values():
        for shard in value.local_shards() if isinstance(value, ShardedTensor) else []:
            shard.tensor.zero_()
    dcp.load(state, checkpoint_id=folder)
    train(first, range(4, 8), rank, world_size)
    first.load_state_dict(state)
    assert contents(first) == before


def test_dcp_alone_loads_the_same_rows_in_place(tmp_path: Path) -> None:
    run_on_ranks(2, _in_place, str(tmp_path))


def _plainly(rank: int, world_size: int, folder: str) -> str:
    """Where the rows are not the same, torch's message leads to what does it."""
    first, second = model(tables=1), model(tables=1)
    train(first, range(4), rank, world_size)
    dcp.save(first.state_dict(), checkpoint_id=folder)
    state = second.state_dict()
    assert state["embeddings.embeddings.t0.weight"].size()[1] == 8
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, checkpoint_id=folder)
    load(second, folder)
    assert contents(second) == contents(first)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dcp_alone_names_what_loads_other_rows(world_size: int, tmp_path: Path) -> None:
    for message in run_on_ranks(world_size, _plainly, str(tmp_path)):
        assert "Size mismatch" in message and "dynamicemb.checkpoint.dcp.load" in message and "t0.keys" in message


def _smaller(rank: int, world_size: int, folder: str) -> tuple[dict[str, dict], dict[str, dict], int]:
    first, second = model(tables=1, capacity=2048), model(tables=1, capacity=128)
    train(first, range(10), rank, world_size)
    dcp.save(first.state_dict(), checkpoint_id=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DynamicEmbWarning)
        load(second, folder)
    messages = [str(one.message) for one in caught if issubclass(one.category, DynamicEmbWarning)]
    assert len(messages) == 1 and "rows of rank" in messages[0] and "'t0'" in messages[0]
    return contents(first), contents(second), int(messages[0].split()[2])


def test_a_smaller_table_keeps_the_highest_scores(tmp_path: Path) -> None:
    for before, after, left_out in run_on_ranks(2, _smaller, str(tmp_path)):
        assert left_out == len(before["t0"]) - len(after["t0"]) > 0
        assert all(before["t0"][key] == row for key, row in after["t0"].items())
        lowest = {row[0] for key, row in before["t0"].items() if key not in after["t0"]}
        assert sum(row[0] for row in after["t0"].values()) / len(after["t0"]) > sum(lowest) / len(lowest)


# ---------------------------------------------------------------------------------------------------- refused


def _refused(rank: int, world_size: int, folder: str) -> None:
    first = model("adam", tables=2)
    train(first, range(4), rank, world_size)
    dcp.save({"model": first.state_dict()}, checkpoint_id=f"{folder}/adam")
    dcp.save({"model": {"scale": torch.ones(1)}}, checkpoint_id=f"{folder}/dense")
    plain = distribute(Model(collection(table("t0"), table("t1"))), {}, SGD, plain=True)
    dcp.save({"model": plain.state_dict()}, checkpoint_id=f"{folder}/static")
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (
            "adam",
            {"tables": 2, "optimizer": "adagrad"},
            "model.",
            "has the optimizer adam, but the model's has adagrad",
        ),
        ("adam", {"tables": 2, "optimizer": "sgd"}, "model.", "has the optimizer adam, but the model's has sgd"),
        ("adam", {"tables": 2, "optimizer": "adam", "dim": 16}, "model.", "has dim 8, but the model's has 16"),
        ("adam", {"tables": 2, "optimizer": "adam", "embedding_dtype": torch.float16}, "model.", "has dtype float32"),
        ("adam", {"tables": 3, "optimizer": "adam"}, "model.", "'t2'.*not in the checkpoint"),
        ("adam", {"tables": 2, "optimizer": "adam"}, "", "prefix='model.'"),
        ("static", {"tables": 2, "optimizer": "adam"}, "model.", "load_static"),
        ("dense", {"tables": 2, "optimizer": "adam"}, "model.", "not in the checkpoint"),
    ]
    for name, arguments, prefix, message in cases:
        module = model(**arguments)
        train(module, range(2), rank, world_size)
        before = contents(module)
        with pytest.raises(CheckpointError, match=message):
            load(module, f"{folder}/{name}", prefix=prefix)
        assert contents(module) == before
    with pytest.raises(CheckpointError, match=r"'t0'.*has rows of a dynamic table"):
        load(plain, f"{folder}/adam", prefix="model.")
    with pytest.raises(CheckpointError, match="checkpoint_id"):
        load(first)
    module = model("adam", tables=3)
    train(module, range(2), rank, world_size)
    own = contents(module)["t2"]
    load(module, f"{folder}/adam", prefix="model.", strict=False)
    assert contents(module) == {**contents(first), "t2": own}, "not strict: what is missing stays"


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run_on_ranks(2, _refused, str(tmp_path))


def _partial(rank: int, world_size: int, folder: str) -> None:
    """A checkpoint of a state dict that somebody has taken entries out of."""
    first, second = model("adam", tables=1), model("adam", tables=1)
    train(first, range(4), rank, world_size)
    train(second, range(60, 62), rank, world_size)
    before = contents(second)
    for name, left_out, message in (
        ("optimizer", ".optimizer.", r"t0: optimizer\.exp_avg, optimizer\.exp_avg_sq"),
        ("numbers", (".progress", ".slots"), "t0: progress, slots"),
    ):
        names = (left_out,) if isinstance(left_out, str) else left_out
        state = {key: value for key, value in first.state_dict().items() if not any(one in key for one in names)}
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        with pytest.raises(CheckpointError, match=r"'t0'.*has no .*strict=False loads the rows"):
            load(second, f"{folder}/{name}")
        assert contents(second) == before
        with pytest.warns(DynamicEmbWarning, match=message.replace("t0", "'t0'")):
            load(second, f"{folder}/{name}", strict=False)
        rows, expected = contents(second)["t0"], contents(first)["t0"]
        assert {key: row[:2] for key, row in rows.items()} == {key: row[:2] for key, row in expected.items()}
        second.load_state_dict(first.state_dict())
        before = contents(second)
    dcp.save({key: value for key, value in first.state_dict().items() if ".keys" not in key}, checkpoint_id=folder)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"no \['keys'\].*belong together"):
            load(second, folder, strict=strict)
    assert contents(second) == before


def test_partial_checkpoints_start_the_rest_afresh(tmp_path: Path) -> None:
    run_on_ranks(2, _partial, str(tmp_path))


def _damaged(rank: int, world_size: int, folder: str) -> list[str]:
    """Checkpoints whose files are whole but whose rows are not those of a table: an error on all ranks."""
    first, second = model(tables=1), model(tables=1)
    train(first, range(4), rank, world_size)
    train(second, range(9, 12), rank, world_size)
    own = contents(second)
    key = "embeddings.embeddings.t0.keys"

    def swapped(keys: torch.Tensor) -> None:
        keys[[3, 4]] = keys[[4, 3]]

    def doubled(keys: torch.Tensor) -> None:
        keys[4] = keys[3]

    def changed(keys: torch.Tensor) -> None:
        keys[5] ^= 1 << 40

    messages = []
    damages: list[Callable[[torch.Tensor], None]] = [swapped, doubled, changed]
    for number, damage in enumerate(damages):
        state = first.state_dict()
        if rank == 0:
            damage(state[key].local_shards()[0].tensor)
        dcp.save(state, checkpoint_id=f"{folder}/{number}")
        with pytest.raises(DynamicEmbError) as caught:
            load(second, f"{folder}/{number}")
        messages.append(str(caught.value))
        assert contents(second) == own
    return messages


def test_rows_in_the_wrong_order_are_refused_on_all_ranks(tmp_path: Path) -> None:
    results = run_on_ranks(2, _damaged, str(tmp_path))
    for messages in results:
        assert all("'t0'" in message and "'keys'" in message for message in messages)
    assert "twice" in results[0][1]


def test_metadata_of_ranks_is_portable(folder: Path, saved: dict[int, list[Any]]) -> None:
    """Nothing of ours is pickled into a checkpoint: whoever has torch can read it."""
    for size in SIZES:
        metadata = (folder / f"from{size}" / ".metadata").read_bytes()
        assert pickle.loads(metadata) and b"dynamicemb" not in metadata
