"""State dicts without all that belongs to a table: rows are loaded and the rest starts fresh, or one error says why."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import CheckpointError, DynamicEmbError, DynamicEmbEvictStrategy, DynamicEmbWarning
from dynamicemb.shard import get_score, set_score, table_statistics
from dynamicemb.shard.tables import dynamic_tables
from tests.checkpoint.models import contents, model, train
from tests.distributed import run_on_ranks
from tests.shard.models import STATIC, collection, distribute, dynamic, one_sample, table

START = "embeddings.embeddings."
#: Entries that a row can do without.
DISPENSABLE = ("scores", "optimizer.exp_avg", "optimizer.exp_avg_sq", "progress", "hyperparameters", "slots")
LFU = DynamicEmbEvictStrategy.LFU


def _said(action: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DynamicEmbWarning)
        result = action()
    return result, [str(one.message) for one in caught if issubclass(one.category, DynamicEmbWarning)]


def _names(keys: list[str]) -> list[str]:
    """DistributedModelParallel leaves out what comes before the collection's own names."""
    return sorted(key.rpartition("embeddings.")[2] for key in keys)


def _without(state: dict[str, Any], name: str, entries: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in [f"{START}{name}.{entry}" for entry in entries]}


def _check_fresh(target: nn.Module, source: nn.Module, own: Any, missing: tuple[str, ...]) -> None:
    """What the table ``t0`` of ``target`` is, said in other words than those of the code."""
    rows, expected = contents(target)["t0"], contents(source)["t0"]
    assert rows.keys() == expected.keys() and len(rows) > 20
    states_are_fresh = any(entry.startswith("optimizer.") for entry in missing)
    for key, (score, embedding, *states) in rows.items():
        assert embedding == expected[key][1]
        assert score == (0 if "scores" in missing else expected[key][0])
        assert all(not any(state) for state in states) if states_are_fresh else tuple(states) == expected[key][2:]
    progress, before = _progress(target), _progress(source)
    assert progress.steps == (0 if states_are_fresh or "progress" in missing else before.steps)
    assert progress.hyperparameters == (own if "hyperparameters" in missing else before).hyperparameters
    if "progress" not in missing:
        assert (progress.clock, progress.hits, progress.evicted) == (before.clock, before.hits, before.evicted)
    else:
        assert (progress.hits, progress.evicted, progress.refused) == (0, 0, 0)
        assert progress.clock >= max(score for score, *_ in rows.values()), "no row is from the future"


def _progress(module: nn.Module) -> Any:
    one = next(one for one in dynamic_tables(module) if one.name == "t0")
    return one.group.progress(one.index)


def _subsets(rank: int, world_size: int) -> None:
    source = model("adam", tables=1)
    for group in source.fused_optimizer.param_groups:
        group["lr"] = 0.25
    train(source, range(5), rank, world_size)
    source.fused_optimizer.step()
    state = source.state_dict()
    for count in range(1, len(DISPENSABLE) + 1):
        for missing in itertools.combinations(DISPENSABLE, count):
            target = model("adam", tables=1)
            train(target, range(60, 62), rank, world_size)
            own = _progress(target)
            outcome, messages = _said(lambda: target.load_state_dict(_without(state, "t0", missing), strict=False))  # noqa: B023
            assert _names(outcome.missing_keys) == sorted(f"t0.{entry}" for entry in missing)
            assert len(messages) == 1 and "'t0'" in messages[0]
            assert all(entry in messages[0] for entry in missing)
            _check_fresh(target, source, own, missing)
            if count == 1:
                train(target, range(5, 7), rank, world_size)  # goes on

    # Of an earlier version, which did not say which optimizer it was: a state that the model's has, too, is no other.
    target = model("adam", tables=1)
    outcome, messages = _said(
        lambda: target.load_state_dict(_without(state, "t0", ("config", "optimizer.exp_avg")), strict=False)
    )
    assert _names(outcome.missing_keys) == ["t0.optimizer.exp_avg"] and len(messages) == 2
    _check_fresh(target, source, None, ("optimizer.exp_avg",))


def test_every_subset_of_entries_starts_fresh_and_says_so() -> None:
    run_on_ranks(1, _subsets)


def _clocks(rank: int, world_size: int) -> None:
    """Without progress the table's own clock goes on; under LRU, where scores are times, not before the latest row."""
    for strategy, steps in itertools.product(DynamicEmbEvictStrategy, (2, 9)):
        source, target = (model(tables=1, strategy=strategy) for _ in range(2))
        if strategy is DynamicEmbEvictStrategy.CUSTOMIZED:
            set_score(source, 1000)
        train(source, range(5), rank, world_size)
        train(target, range(60, 60 + steps), rank, world_size)
        with pytest.warns(DynamicEmbWarning, match="'t0': progress"):
            target.load_state_dict(_without(source.state_dict(), "t0", ("progress",)), strict=False)
        assert _progress(target).clock == (max(5, steps) if strategy is DynamicEmbEvictStrategy.LRU else steps)


def test_a_clock_goes_on_where_progress_is_missing() -> None:
    run_on_ranks(1, _clocks)


def _refused(rank: int, world_size: int) -> None:
    source, target = model(tables=2), model(tables=2)
    train(source, range(4), rank, world_size)
    train(target, range(60, 62), rank, world_size)
    state, before = source.state_dict(), contents(target)
    several = (("keys",), ("weight",), ("keys", "scores"), ("weight", "optimizer.sum"), ("keys", "weight"))
    for name, missing in itertools.product(("t0", "t1"), several):
        with pytest.raises(
            CheckpointError, match=rf"state dict of table '{name}'.*no '(keys|weight)'.*belong together"
        ):
            target.load_state_dict(_without(state, name, missing), strict=False)
        with pytest.raises(RuntimeError, match="Missing key"):
            target.load_state_dict(_without(state, name, missing))
        assert contents(target) == before
    everything = tuple(key.removeprefix(f"{START}t1.") for key in state if key.startswith(f"{START}t1."))
    outcome, messages = _said(lambda: target.load_state_dict(_without(state, "t1", everything), strict=False))
    assert not messages and _names(outcome.missing_keys) == sorted(f"t1.{entry}" for entry in everything)
    assert contents(target) == {"t0": contents(source)["t0"], "t1": before["t1"]}, "a table that is missing stays"
    state[f"{START}t0.other"] = torch.zeros(1)
    outcome, messages = _said(lambda: target.load_state_dict(dict(state), strict=False))
    assert _names(outcome.unexpected_keys) == ["t0.other"] and not messages
    assert contents(target) == contents(source)


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_without_keys_are_refused_and_missing_tables_stay(world_size: int) -> None:
    run_on_ranks(world_size, _refused)


def _on_one_rank(rank: int, world_size: int) -> None:
    """Different entries on different ranks: an error on all of them."""
    source, target = model(tables=2), model(tables=2)
    train(source, range(4), rank, world_size)
    source(
        one_sample({name: torch.tensor([7]) for name in ("t0", "t1")})
    ).backward()  # the latest row of one rank alone
    before = contents(target)
    for missing in (("progress",), ("optimizer.sum",), ("weight",), ("config",)):
        state = source.state_dict()
        state = _without(state, "t0", missing) if rank == 1 else state
        with pytest.raises(DynamicEmbError, match="t0"):
            target.load_state_dict(state, strict=False)
        assert contents(target) == before
    # On all ranks: those that own few rows know as well when the latest was touched.
    target.load_state_dict(_without(source.state_dict(), "t0", ("progress",)), strict=False)
    assert get_score(target) == get_score(source)
    assert table_statistics(target)["t0"].size == table_statistics(source)["t0"].size


def test_partial_state_dicts_on_several_ranks() -> None:
    run_on_ranks(2, _on_one_rank)


def _beside_static(rank: int, world_size: int) -> None:
    """A static table that is missing is no KeyError of torchrec's."""
    module = distribute(collection(table("t0"), table("t1")), {"t0": dynamic(), "t1": STATIC})
    state = {key: value for key, value in module.state_dict().items() if not key.startswith("embeddings.t1.")}
    assert module.load_state_dict(dict(state), strict=False).missing_keys == ["embeddings.t1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*t1\.weight"):
        module.load_state_dict(state)


def test_a_static_table_that_is_missing_is_reported() -> None:
    run_on_ranks(1, _beside_static)


def _inner_module(rank: int, world_size: int) -> None:
    """torch does not say whether it loads strictly: rows are loaded, and torch raises if it does."""
    source, target = model(tables=1).module, model(tables=1).module
    train(source, range(4), rank, world_size)
    state = _without(source.state_dict(), "t0", ("optimizer.sum",))
    with pytest.warns(DynamicEmbWarning, match=r"'t0': optimizer\.sum"):
        assert target.load_state_dict(dict(state), strict=False).missing_keys == [f"{START}t0.optimizer.sum"]
    assert contents(target)["t0"].keys() == contents(source)["t0"].keys()
    with pytest.warns(DynamicEmbWarning), pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(dict(state))


def test_a_module_that_contains_the_collection() -> None:
    run_on_ranks(1, _inner_module)
