"""What one way of loading refuses, every way refuses, in the same words: strategy, dtype, dim and optimizer."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from dynamicemb import CheckpointError, DynamicEmbError, DynamicEmbEvictStrategy, DynamicEmbWarning
from dynamicemb.checkpoint.dcp import load, sized_state_dict
from dynamicemb.checkpoint.dump import DynamicEmbDump
from dynamicemb.checkpoint.load import DynamicEmbLoad
from dynamicemb.checkpoint.static import load_static
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.options import EMBEDDING_DTYPES
from dynamicemb.shard.state_dict import DTYPE_CODES, EVICT_STRATEGY_CODES, OPTIMIZER_CODES
from tests.checkpoint.models import OPTIMIZERS, Model, contents, model, train
from tests.distributed import run_on_ranks
from tests.shard.models import STATIC, collection, distribute, dynamic, one_sample, table

START = "embeddings.embeddings.t0."
STRATEGIES = [strategy.value for strategy in DynamicEmbEvictStrategy]
#: Every kind of difference: (what, of the saved model, of the model), as files call it.
DIFFERENCES = [
    *(("evict_strategy", *pair) for pair in itertools.permutations(STRATEGIES, 2)),
    *(("dtype", *pair) for pair in itertools.permutations(["float32", "float16", "bfloat16"], 2)),
    ("dim", 8, 16), ("dim", 8, 4),
    *(("optimizer", *pair) for pair in itertools.permutations(OPTIMIZERS, 2)),
]  # fmt: skip


def _built(what: str, value: Any, **others: Any) -> nn.Module:
    arguments: dict[str, Any] = {
        "evict_strategy": lambda: {"strategy": DynamicEmbEvictStrategy(value)},
        "dtype": lambda: {"embedding_dtype": getattr(torch, value)},
        "dim": lambda: {"dim": value},
        "optimizer": lambda: {"optimizer": value},
    }[what]()
    return model(tables=1, capacity=4096, **arguments, **others)


def _expected(what: str, saved: Any, own: Any) -> str:
    """The words that are the same everywhere."""
    if what == "optimizer":
        return f"has the optimizer {saved}, but the model's has {own}; .*give the model that optimizer"
    return f"has {what} {saved}, but the model's has {own}; give the model {saved}"


def _ways(source: nn.Module, target: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    """Every way to load what ``source`` has into ``target``."""
    DynamicEmbDump(folder / "dump", source, optim=True)
    dcp.save(source.state_dict(), checkpoint_id=folder / "dcp")
    return {
        "files": lambda: DynamicEmbLoad(folder / "dump", target, optim=True),
        "state dict": lambda: target.load_state_dict(source.state_dict()),
        "not strict": lambda: target.load_state_dict(source.state_dict(), strict=False),
        "inner module": lambda: target.module.load_state_dict(source.state_dict(), strict=False),
        "torch": lambda: set_model_state_dict(target.module, get_model_state_dict(source.module)),
        "dcp": lambda: load(target, folder / "dcp"),
        "dcp, not strict": lambda: load(target, folder / "dcp", strict=False),
        "dcp by hand": lambda: sized_state_dict(target, folder / "dcp"),
    }


def _refused(rank: int, world_size: int, folder: str, differences: list[tuple[str, Any, Any]]) -> None:
    for number, (what, saved, own) in enumerate(differences):
        source, target = _built(what, saved), _built(what, own)
        train(source, range(3), rank, world_size)
        train(target, range(60, 61), rank, world_size)
        before = contents(target)
        for name, way in _ways(source, target, Path(folder) / str(number)).items():
            with pytest.raises(CheckpointError) as caught:
                way()
            message = str(caught.value)
            assert re.search(_expected(what, saved, own), message) and "table 't0'" in message, f"{name}: {message}"
            assert contents(target) == before


def test_every_way_refuses_every_difference_in_the_same_words(tmp_path: Path) -> None:
    run_on_ranks(1, _refused, str(tmp_path), DIFFERENCES)


def test_all_ranks_refuse(tmp_path: Path) -> None:
    some = [
        next(one for one in DIFFERENCES if one[0] == what) for what in ("evict_strategy", "dtype", "dim", "optimizer")
    ]
    run_on_ranks(2, _refused, str(tmp_path), some)


def _in_place(rank: int, world_size: int, folder: str) -> None:
    """torch's own dcp.load, where both have the same rows: it converts dtypes, and knows no strategies."""
    strategies = [("evict_strategy", "lfu", "lru"), ("evict_strategy", "lru", "customized")]
    cases = [*strategies, ("dtype", "float32", "bfloat16"), ("dtype", "bfloat16", "float32")]
    for number, (what, saved, own) in enumerate(cases):
        source, target = _built(what, saved), _built(what, own)
        for one in (source, target):
            train(one, range(2), rank, world_size)
        before = contents(target)
        dcp.save(source.state_dict(), checkpoint_id=f"{folder}/{number}")
        state = target.state_dict()
        dcp.load(state, checkpoint_id=f"{folder}/{number}")
        for way in (target.load_state_dict, partial(set_model_state_dict, target.module)):
            with pytest.raises(CheckpointError, match=_expected(what, saved, own)):
                way(dict(state))  # a copy: torchrec renames its entries, and leaves them so after an error
        assert contents(target) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_dcp_has_loaded_in_place_is_refused(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _in_place, str(tmp_path))


def _one_rank_differs(rank: int, world_size: int) -> None:
    source, target = model(tables=1), model(tables=1)
    train(source, range(2), rank, world_size)
    before = contents(target)
    state = source.state_dict()
    if rank == 1:
        state[START + "config"] = torch.tensor([EVICT_STRATEGY_CODES[DynamicEmbEvictStrategy.LFU], 2, 0])
    with pytest.raises(DynamicEmbError, match="has evict_strategy lfu, but the model's has lru"):
        target.load_state_dict(state)
    assert contents(target) == before


def test_another_strategy_on_one_rank_is_an_error_on_all() -> None:
    run_on_ranks(2, _one_rank_differs)


def _rows_alone(rank: int, world_size: int) -> None:
    """What the message about another optimizer says."""
    source, target = model("adam", tables=1), model("adagrad", tables=1)
    train(source, range(2), rank, world_size)
    state = source.state_dict()
    state = {key: value for key, value in state.items() if ".optimizer." not in key and "hyperparameters" not in key}
    with pytest.warns(DynamicEmbWarning, match=r"'t0': optimizer\.sum, hyperparameters"):
        target.load_state_dict(state, strict=False)
    rows, expected = contents(target)["t0"], contents(source)["t0"]
    assert {key: row[:2] for key, row in rows.items()} == {key: row[:2] for key, row in expected.items()}


def test_rows_are_loaded_without_another_optimizer() -> None:
    run_on_ranks(1, _rows_alone)


# ---------------------------------------------------------------------------------------------------- codes


def test_codes_are_part_of_the_format() -> None:
    """Written down here once more: saved state dicts have them."""
    strategies = {strategy.value: code for strategy, code in EVICT_STRATEGY_CODES.items()}
    assert {name: strategies[name] for name in ("lru", "lfu", "customized")} == {"lru": 0, "lfu": 1, "customized": 2}
    optimizers = {kind.name: code for kind, code in OPTIMIZER_CODES.items()}
    expected = {"SGD": 0, "ADAGRAD": 1, "ROWWISE_ADAGRAD": 2, "ADAM": 3}
    assert {name: optimizers[name] for name in expected} == expected
    assert {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2} == DTYPE_CODES
    assert set(strategies) == set(STRATEGIES) and set(OPTIMIZER_CODES) == set(OptimizerKind)
    assert set(DTYPE_CODES) == set(EMBEDDING_DTYPES)
    for codes in (strategies, optimizers, DTYPE_CODES):
        assert len(set(codes.values())) == len(codes)


def _other_codes(rank: int, world_size: int) -> None:
    source, target = model(tables=1), model(tables=1)
    train(source, range(2), rank, world_size)
    for value in (
        torch.tensor([7, 0, 0]),
        torch.tensor([0, 99, 0]),
        torch.tensor([0, 2, 9]),
        torch.zeros(3),
        torch.arange(2),
        "no",
    ):
        with pytest.raises(CheckpointError, match=r"'t0', entry 'config'"):
            target.load_state_dict({**source.state_dict(), START + "config": value})


def test_codes_of_later_versions_are_refused() -> None:
    run_on_ranks(1, _other_codes)


# ---------------------------------------------------------------------------------------------------- earlier versions


def _earlier(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith(".config")}


def _earlier_versions(rank: int, world_size: int, folder: str) -> None:
    """Without the entry that tells strategies: loaded with a warning, refused where rows themselves tell."""
    source, target = model("adam", tables=2), model("adam", tables=2)
    train(source, range(3), rank, world_size)
    dcp.save(_earlier(source.state_dict()), checkpoint_id=f"{folder}/adam")
    for way in (
        lambda: target.load_state_dict(_earlier(source.state_dict())),
        lambda: load(target, f"{folder}/adam"),
    ):
        train(target, range(60, 61), rank, world_size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DynamicEmbWarning)
            way()
        messages = [str(one.message) for one in caught if issubclass(one.category, DynamicEmbWarning)]
        assert len(messages) == 1 and "t0, t1" in messages[0] and "does not say which eviction strategy" in messages[0]
        assert contents(target) == contents(source)
    for optimizer in ("adagrad", "rowwise_adagrad", "sgd"):
        other = model(optimizer, tables=2)
        for way in (
            lambda: other.load_state_dict(_earlier(source.state_dict()), strict=False),  # noqa: B023
            lambda: load(other, f"{folder}/adam"),  # noqa: B023
        ):
            with pytest.raises(CheckpointError, match=f"optimizer states .*exp_avg.*, but {optimizer} has"):
                way()
    lfu = model(tables=1, strategy=DynamicEmbEvictStrategy.LFU)
    train(lfu, range(3), rank, world_size, ids=300)
    with pytest.raises(CheckpointError, match="so its evict_strategy is not lru"):
        model(tables=1).load_state_dict(_earlier(lfu.state_dict()))


def test_earlier_state_dicts_are_loaded_with_a_warning(tmp_path: Path) -> None:
    run_on_ranks(1, _earlier_versions, str(tmp_path))


# ---------------------------------------------------------------------------------------------------- exchanged


def _pair(kind: Any, optimizer: bool) -> nn.Module:
    constraints = {"t0": kind, "t1": dynamic()}
    update = (torch.optim.Adagrad, {"lr": 0.1}) if optimizer else (torch.optim.SGD, {"lr": 0.1})
    return distribute(Model(collection(table("t0", 40), table("t1", 40))), constraints, update)


def _exchanged(rank: int, world_size: int, folder: str) -> None:
    for optimizer in (False, True):
        saved = {"dynamic": _pair(dynamic(), optimizer), "static": _pair(STATIC, optimizer)}
        models = {
            "dynamic": _pair(dynamic(), optimizer),
            "static": _pair(STATIC, optimizer),
            "all static": distribute(
                Model(collection(table("t0", 40), table("t1", 40))),
                {"t0": STATIC, "t1": STATIC},
                (torch.optim.SGD, {"lr": 0.1}),
            ),
            "torchrec's": distribute(
                Model(collection(table("t0", 40), table("t1", 40))), {}, (torch.optim.SGD, {"lr": 0.1}), plain=True
            ),
        }
        for name, source in saved.items():
            _touch_all(source)
            dcp.save({"model": source.state_dict()}, checkpoint_id=f"{folder}/{name}{optimizer}")
        path = f"{folder}/dynamic{optimizer}"
        for name in ("static", "all static", "torchrec's"):
            for strict in (True, False):
                with pytest.raises(
                    CheckpointError, match=r"'t0'.*rows of a dynamic table.*is static.*use_dynamicemb=True"
                ):
                    load(models[name], path, prefix="model.", strict=strict)
                if name != "torchrec's":
                    with pytest.raises(CheckpointError, match=r"'t0'.*rows of a dynamic table.*is static"):
                        models[name].load_state_dict(saved["dynamic"].state_dict(), strict=strict)
        before = contents(models["dynamic"])
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=r"'t0'.*a static table.*load_static"):
                load(models["dynamic"], f"{folder}/static{optimizer}", prefix="model.", strict=strict)
        with pytest.warns(DynamicEmbWarning, match="t0.*load_static"):
            models["dynamic"].load_state_dict(saved["static"].state_dict(), strict=False)
        assert contents(models["dynamic"])["t0"] == before["t0"]
        with pytest.raises(CheckpointError, match=r"'t0'.*those of a dynamic table.*load_state_dict"):
            load_static(models["dynamic"], saved["dynamic"].state_dict(), {"model.embeddings": ["t0"]})
        assert contents(models["dynamic"])["t0"] == before["t0"]


def _touch_all(module: nn.Module) -> None:
    """As many rows as a static table has."""
    module(one_sample({"t0": torch.arange(40), "t1": torch.arange(40)})).backward()


@pytest.mark.parametrize("world_size", [1, 2])
def test_static_and_dynamic_tables_are_not_exchanged(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _exchanged, str(tmp_path))
