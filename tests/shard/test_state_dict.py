"""What torchrec and torch see of a collection with dynamic tables: parameters and state."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import CheckpointError, DynamicEmbError, DynamicEmbEvictStrategy, DynamicEmbWarning
from dynamicemb.shard import get_score, restore, set_score, sharded_rows, state_dict, table_statistics
from tests.checkpoint.models import OPTIMIZERS, contents, model, train
from tests.distributed import run_on_ranks
from tests.oracle import mix64, owner
from tests.shard.alone import alone, no_process_group
from tests.shard.models import (
    CPU,
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    table,
    train_step,
)

IDS = {"item": torch.arange(4), "country": torch.arange(4), "user": torch.arange(4)}
SGD = (torch.optim.SGD, {"lr": 1.0})
NUMBERS = ["progress", "hyperparameters", "slots", "config"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = collection(table("item", 40), table("country", 40), table("user", 40))
        self.dense = nn.Linear(8, 1)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Any]:
        return dict(self.embeddings(features).items())


def build(plain: bool = False, all_dynamic: bool = False) -> nn.Module:
    options = dynamic(initializer_args=ZEROS)
    constraints = {"item": options, "country": options if all_dynamic else STATIC, "user": options}
    return distribute(Model(), dict.fromkeys(constraints, STATIC) if plain else constraints, SGD, plain=plain)


def entries(name: str, *states: str) -> list[str]:
    """The names that a table must have in a state dict, written down here once more."""
    return sorted(f"{name}.{entry}" for entry in ["keys", "scores", "weight", *states, *NUMBERS])


# ---------------------------------------------------------------------------------------------------- contents


def _names(rank: int, world_size: int) -> None:
    module = build()
    dense = ["dense.bias", "dense.weight"]
    tables = [f"embeddings.embeddings.{entry}" for name in ("item", "user") for entry in entries(name)]
    assert sorted(module.state_dict()) == sorted([*dense, "embeddings.embeddings.country.weight", *tables])
    assert sorted(module.state_dict()) == sorted(module.module.state_dict())
    prefixed = module.state_dict(prefix="a.")
    assert sorted(prefixed) == sorted(f"a.{name}" for name in module.state_dict())
    for optimizer, states in {
        "sgd": [],
        "adagrad": ["optimizer.sum"],
        "rowwise_adagrad": ["optimizer.sum"],
        "adam": ["optimizer.exp_avg", "optimizer.exp_avg_sq"],
    }.items():
        for tables in (1, 3):  # one group, and two
            expected = [entry for number in range(tables) for entry in entries(f"t{number}", *states)]
            state = model(optimizer, tables=tables).state_dict()
            start = "embeddings.embeddings."
            assert sorted(name.removeprefix(start) for name in state if name.startswith(start)) == expected


@pytest.mark.parametrize("world_size", [1, 2])
def test_names_depend_on_the_tables_alone(world_size: int) -> None:
    run_on_ranks(world_size, _names)


def _rows(rank: int, world_size: int) -> Any:
    sharded_rows._SHARD_ROWS = 50
    module = model("adam")
    train(module, range(6), rank, world_size)
    result = {}
    for name, rows in contents(module).items():
        state = {
            entry: module.state_dict()[f"embeddings.embeddings.{name}.{entry}"]
            for entry in ("keys", "scores", "weight", "optimizer.exp_avg", "optimizer.exp_avg_sq")
        }
        local = {}
        for entry, value in state.items():
            assert isinstance(value, ShardedTensor)
            shards = value.local_shards()
            assert all(shard.tensor.device == CPU for shard in shards) and len(shards) == -(-len(rows) // 50)
            local[entry] = torch.cat([shard.tensor for shard in shards])
        found = {
            key: (
                int(local["scores"][row]),
                *(local[entry][row].numpy().tobytes() for entry in list(state)[2:]),
            )
            for row, key in enumerate(local["keys"].tolist())
        }
        assert found == rows
        result[name] = local["keys"].tolist(), tuple(state["keys"].size())
    progress = module.state_dict()["embeddings.embeddings.t0.progress"].tolist()
    statistics = table_statistics(module)["t0"]
    assert progress == [6, 6, 0, statistics.hits, statistics.evicted, statistics.refused]
    reversed_shards = module.state_dict()
    for value in reversed_shards.values():
        if isinstance(value, ShardedTensor):
            value.local_shards().reverse()  # torch promises no order
    loaded = model("adam")
    loaded.load_state_dict(reversed_shards)
    assert contents(loaded) == contents(module)
    return result


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_of_all_ranks_are_the_sorted_table(world_size: int) -> None:
    results = run_on_ranks(world_size, _rows)
    for name in ("t0", "t1", "t2"):
        keys = [key for result in results for key in result[name][0]]
        assert keys == sorted(keys, key=mix64) and len(keys) > 150
        assert all(result[name][1] == (len(keys),) for result in results)
        assert all(owner(key, world_size) == rank for rank, result in enumerate(results) for key in result[name][0])


# ---------------------------------------------------------------------------------------------------- round trip


def _round_trip(rank: int, world_size: int) -> None:
    state_dict._PIECE_ROWS = restore._PIECE_ROWS = 37  # several pieces
    for optimizer in OPTIMIZERS:
        first, second = (model(optimizer, init_capacity=32) for _ in range(2))
        train(first, range(8), rank, world_size)
        train(second, range(50, 60), rank, world_size)
        state, before = first.state_dict(), contents(first)
        train(first, range(8, 12), rank, world_size)
        outcome = second.load_state_dict(dict(state))
        assert not outcome.missing_keys and not outcome.unexpected_keys
        assert contents(second) == before, "the rows of a state dict are those of the time when it was made"
        train(second, range(8, 12), rank, world_size)
        assert contents(first) == contents(second) and table_statistics(first) == table_statistics(second)
        # Unwrapped on one side, wrapped on the other.
        third = model(optimizer, init_capacity=32)
        third.module.load_state_dict(state)
        assert contents(third) == before


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_state_dict_restores_everything(world_size: int) -> None:
    run_on_ranks(world_size, _round_trip)


def _growing(rank: int, world_size: int) -> None:
    """Keys of few buckets make a table grow in which few of them find a place: its size does not follow from its rows.

    Neighbours in the order of mixed keys are in the same bucket.
    """
    crowd = sorted(range(100_000), key=mix64)[:60]
    arguments: dict[str, Any] = {"tables": 1, "capacity": 4096, "init_capacity": 32, "max_load_factor": 0.9}
    first, second = model(**arguments), model(**arguments)
    first(features_of({"t0": [crowd]})).backward()
    train(second, range(50, 80), rank, world_size)
    before = table_statistics(first)["t0"]
    assert before.size < 30 and before.slots >= 64
    second.load_state_dict(first.state_dict())
    assert table_statistics(second)["t0"] == before
    losses = [train(one, range(4, 40), rank, world_size) for one in (first, second)]
    assert losses[0] == losses[1] and table_statistics(first) == table_statistics(second)


def test_a_table_that_grows_goes_on_growing() -> None:
    run_on_ranks(2, _growing)


def _complete_tensors(rank: int, world_size: int) -> None:
    """Every rank has all rows as plain tensors, as from one file: each takes its own."""
    first, second = model("adam"), model("adam")
    train(first, range(5), rank, world_size)
    state = first.state_dict()
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            pieces: list[Any] = [None] * world_size
            local = [shard.tensor for shard in value.local_shards()]
            dist.all_gather_object(pieces, torch.cat(local))
            state[name] = torch.cat(pieces)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    second.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert contents(second) == contents(first)


@pytest.mark.parametrize("world_size", [1, 3])
def test_complete_tensors_are_divided_among_the_ranks(world_size: int) -> None:
    run_on_ranks(world_size, _complete_tensors)


def _without_group(rank: int, world_size: int) -> None:
    with no_process_group():
        first, second = alone(), alone()
        first(features_of({"t0": [[1, 2, 5]]})).wait()["t0"].values().sum().backward()
        state = first.state_dict()
        assert sorted(state) == [f"embeddings.{entry}" for entry in entries("t0")]
        assert all(type(value) is torch.Tensor for value in state.values())
        second.load_state_dict(copy.deepcopy(state))
        assert contents(second) == contents(first) and len(contents(second)["t0"]) == 3
        first, second = (alone(evict_strategy=DynamicEmbEvictStrategy.CUSTOMIZED) for _ in range(2))
        set_score(first, -5)
        second.load_state_dict(first.state_dict())
        assert get_score(second) == {"t0": -5}


def test_a_single_process_without_a_group() -> None:
    run_on_ranks(1, _without_group)


def _subgroup(rank: int, world_size: int) -> Any:
    """Two of three ranks share the tables; the third takes part in nothing."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    modules = [
        distribute(Model(), dict.fromkeys(IDS, dynamic(initializer_args=ZEROS)), SGD, group=group) for _ in range(2)
    ]
    train_step(modules[0], features_of({name: [list(range(rank, 20))] for name in IDS}))
    modules[1].load_state_dict(modules[0].state_dict())
    assert contents(modules[1]) == contents(modules[0])
    return contents(modules[0])["item"]


def test_tables_on_some_of_the_ranks() -> None:
    results = run_on_ranks(3, _subgroup)
    assert sorted([*results[0], *results[2]]) == list(range(20)) and all(len(results[rank]) > 2 for rank in (0, 2))


def _by_torch(rank: int, world_size: int) -> None:
    """As for torchrec's own tables, torch's functions for state dicts take what is inside DistributedModelParallel."""
    first, second = model("adam").module, model("adam").module
    train(first, range(5), rank, world_size)
    state = get_model_state_dict(first)
    assert sorted(state) == sorted(first.state_dict())
    set_model_state_dict(second, state)
    assert contents(second) == contents(first)


def test_model_state_dict_of_torch() -> None:
    run_on_ranks(2, _by_torch)


# ---------------------------------------------------------------------------------------------------- torch.save


def _mixed() -> nn.Module:
    constraints = {"item": dynamic(initializer_args=ZEROS), "country": STATIC, "user": dynamic(initializer_args=ZEROS)}
    return distribute(Model(), constraints, (torch.optim.Adagrad, {"lr": 1.0}))


def _save(rank: int, world_size: int, folder: str) -> Any:
    """A static table is beside the dynamic ones; several shards of a table."""
    sharded_rows._SHARD_ROWS = 8
    first, second = _mixed(), _mixed()
    train_step(first, features_of({name: [list(range(rank, 40))] for name in IDS}))
    path = f"{folder}/{world_size}-{rank}.pt"
    torch.save(first.state_dict(), path)
    for weights_only in (True, False):
        train_step(second, features_of({name: [[1, 90, 91]] for name in ("item", "user")} | {"country": [[3]]}))
        second.load_state_dict(torch.load(path, weights_only=weights_only))
        assert contents(second) == contents(first)
        every = {name: torch.arange(40) for name in IDS}
        expected, result = evaluated(first, every), evaluated(second, every)
        assert all(expected[name].any() and torch.equal(result[name], expected[name]) for name in IDS)
    if world_size > 1:
        dist.barrier()
        with pytest.raises(CheckpointError, match=f"rank {1 - rank} of 2 saved this.*here is rank {rank} of 2"):
            torch.load(f"{folder}/2-{1 - rank}.pt", weights_only=True)
    return len(contents(first)["item"])


def test_what_torch_saves_is_loaded_with_weights_only(tmp_path: Path) -> None:
    (rows,) = run_on_ranks(1, _save, str(tmp_path))
    assert sum(run_on_ranks(2, _save, str(tmp_path))) == rows == 40
    # In a process that has never heard of this package, and in one without a process group.
    code = (
        "import sys, torch; state = torch.load(sys.argv[1], weights_only=True); "
        "assert 'dynamicemb' not in sys.modules; "
        "print({type(value) for value in state.values()}, state['embeddings.embeddings.item.keys'].shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "1-0.pt")], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "{<class 'torch.Tensor'>} torch.Size([40])"
    with pytest.raises(CheckpointError, match=r"rank 0 of 2.*initialize a process group"):
        torch.load(tmp_path / "2-0.pt", weights_only=True)


# ---------------------------------------------------------------------------------------------------- refused

Change = Callable[[dict[str, Any], int], None]


def _changes() -> dict[str, tuple[Change, str]]:
    """What may be wrong with a state dict of t0 (by a name), on one rank of two, and what must be said about it."""
    start = "embeddings.embeddings.t0."

    def local(state: dict[str, Any], entry: str) -> torch.Tensor:
        return state[start + entry].local_shards()[0].tensor

    def replaced(entry: str, value: Callable[[Any], Any]) -> Change:
        def change(state: dict[str, Any], rank: int) -> None:
            state[start + entry] = value(state[start + entry])

        return change

    def keys(action: Callable[[torch.Tensor], Any]) -> Change:
        return lambda state, rank: action(local(state, "keys"))

    def of_rows(place: int) -> Callable[[torch.Tensor], Any]:
        return lambda values: values.__setitem__(place + 1, values[place].clone())

    def fewer(state: dict[str, Any], rank: int) -> None:
        for value in state.values():
            if isinstance(value, ShardedTensor):
                value.local_shards().clear()

    return {
        "twice": (keys(of_rows(3)), "'keys'.*twice"),
        "order": (keys(lambda values: values.copy_(values.flip(0))), "'keys'.*order of mixed keys"),
        "foreign": (keys(lambda values: values[0].copy_(torch.tensor(_foreign(values)))), "belongs to rank.*dcp.load"),
        "dtype": (replaced("scores", lambda value: torch.zeros(value.size()[0])), "'scores'.*float32"),
        "shape": (
            replaced("weight", lambda value: torch.zeros(value.size()[0], 7)),
            "has dim 7, but the model's has 8; give the model 7",
        ),
        "other rows": (replaced("scores", lambda value: torch.zeros(3, dtype=torch.int64)), "'scores'.*other rows"),
        "no tensor": (replaced("optimizer.sum", lambda value: "none"), "'optimizer.sum'.*expected rows"),
        "scalar": (replaced("weight", lambda value: torch.zeros(())), "'weight'.*expected rows"),
        "progress": (replaced("progress", lambda value: value[:3]), "'progress'.*expected 6"),
        "negative": (replaced("progress", lambda value: -value), "damaged"),
        "infinite": (replaced("hyperparameters", lambda value: value * float("inf")), "damaged"),
        "other numbers": (replaced("slots", lambda value: value + value.new_tensor([8, 8])), "different ones"),
        "lost": (fewer, "rows, of which the ranks have"),
    }


def _foreign(keys: torch.Tensor) -> int:
    """A key of another rank that comes before those of this one, which is rank 1."""
    return next(key for key in range(100) if owner(key, 2) == 0)


def _hostile(rank: int, world_size: int) -> list[dict[str, tuple[str, str]]]:
    source, target = model(tables=2), model(tables=2)
    train(source, range(4), rank, world_size)
    train(target, range(60, 63), rank, world_size)
    before = contents(target), table_statistics(target)
    messages = {}
    for name, (change, _) in _changes().items():
        state = source.state_dict()
        if rank == 1:
            change(state, rank)
        with pytest.raises(DynamicEmbError) as caught:
            target.load_state_dict(state)
        messages[name] = type(caught.value).__name__, str(caught.value)
        assert (contents(target), table_statistics(target)) == before, name
    target.load_state_dict(source.state_dict())
    assert contents(target) == contents(source)
    return [messages]


def test_what_is_wrong_on_one_rank_is_an_error_on_all_before_anything_changes() -> None:
    (first,), (second,) = run_on_ranks(2, _hostile)
    for name, (_, expected) in _changes().items():
        for messages in (first, second):
            kind, message = messages[name]
            assert kind in ("CheckpointError", "RemoteRankError")
            assert re.search(expected, message), f"{name}: {message}"
            assert "t0" in message
        assert second[name][0] == "CheckpointError"


def _missing(rank: int, world_size: int) -> None:
    source, target = model(tables=2), model(tables=2)
    train(source, range(3), rank, world_size)
    train(target, range(9, 11), rank, world_size)
    own = contents(target)
    state = source.state_dict()
    for entry in ("keys", "optimizer.sum"):
        del state[f"embeddings.embeddings.t1.{entry}"]
    with pytest.raises(RuntimeError, match=r"Missing key.*t1\.keys.*t1\.optimizer\.sum"):
        target.load_state_dict(dict(state))
    assert contents(target) == own
    state = source.state_dict()
    state["embeddings.embeddings.t0.optimizer.exp_avg"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*t0\.optimizer\.exp_avg"):
        target.load_state_dict(state)
    only_one = source.state_dict()
    if rank == 0:
        del only_one["embeddings.embeddings.t0.keys"]
    with pytest.raises(CheckpointError if world_size > 1 else RuntimeError):
        target.load_state_dict(only_one)


@pytest.mark.parametrize("world_size", [1, 2])
def test_missing_and_unexpected_keys(world_size: int) -> None:
    run_on_ranks(world_size, _missing)


# ---------------------------------------------------------------------------------------------------- static tables


def load_static_state(rank: int, world_size: int) -> None:
    """Rows of a static table belong to positions, not to ids: they are not loaded, and that is said."""
    plain = build(plain=True)
    train_step(plain, features_of({name: [[1, 2, 3]] for name in IDS}))
    state = plain.state_dict()
    module = build()
    train_step(module, features_of({name: [[2, 7]] for name in IDS}))
    own = evaluated(module, IDS)
    with pytest.warns(DynamicEmbWarning, match="item, user.*load_static"):
        module.load_state_dict(dict(state), strict=False)
    after = evaluated(module, IDS)
    assert torch.equal(after["item"], own["item"])
    assert torch.equal(after["country"], evaluated(plain, IDS)["country"])
    with pytest.warns(DynamicEmbWarning), pytest.raises(RuntimeError, match=r"Missing key.*item\.keys"):
        module.load_state_dict(dict(state))


def test_load_state_dict_of_a_static_model() -> None:
    run_on_ranks(1, load_static_state)


def _from_values(rank: int, world_size: int) -> None:
    """The module to be sharded has values: torchrec loads those of static tables when it makes the sharded one."""
    embeddings = EmbeddingCollection(tables=[table("item", 40), table("country", 40)], device=CPU)
    expected = embeddings.embeddings["country"].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DynamicEmbWarning)
        module = distribute(embeddings, {"item": dynamic(initializer_args=ZEROS), "country": STATIC}, SGD)
    ids = {"item": torch.arange(4), "country": torch.arange(40)}
    result = evaluated(module, ids)
    assert not result["item"].any() and torch.equal(result["country"], expected)


def test_a_module_with_values_is_sharded() -> None:
    run_on_ranks(2, _from_values)


def no_warning_without_dynamic_tables(rank: int, world_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DynamicEmbWarning)
        module = distribute(Model(), dict.fromkeys(IDS, STATIC), SGD)
        module.load_state_dict(module.state_dict())
        assert "embeddings.embeddings.item.weight" in module.state_dict()


def test_our_sharder_with_static_tables_alone_is_silent() -> None:
    run_on_ranks(1, no_warning_without_dynamic_tables)


# ---------------------------------------------------------------------------------------------------- parameters


def parameters(rank: int, world_size: int) -> None:
    module, plain = build(), build(plain=True)
    names, plain_names = (sorted(name for name, _ in entry.named_parameters()) for entry in (module, plain))
    assert names == plain_names
    dense = sorted(name for name, _ in in_backward_optimizer_filter(module.named_parameters()))
    assert dense == ["dense.bias", "dense.weight"]
    in_backward = dict(in_backward_optimizer_filter(module.named_parameters(), include=True))
    assert sorted(in_backward) == [f"embeddings.embeddings.{name}.weight" for name in ("country", "item", "user")]
    assert all(in_backward[f"embeddings.embeddings.{name}.weight"].numel() == 0 for name in ("item", "user"))
    assert sorted(module.fused_optimizer.params) == sorted(plain.fused_optimizer.params)
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    module.load_state_dict(module.state_dict())
    assert before == {name: id(parameter) for name, parameter in module.named_parameters()}
    # A user's optimizer over all parameters, and a norm over their gradients, meet nothing that they cannot bear.
    train_step(module, features_of({name: [[1]] for name in IDS}))
    assert all(in_backward[name].grad is None or in_backward[name].grad.numel() == 0 for name in in_backward)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    assert module.module.embeddings.fused_optimizer is not None


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_are_named_as_torchrec_names_them(world_size: int) -> None:
    run_on_ranks(world_size, parameters)
