"""Calls that not all ranks make: an error after the time-out of the group, which says who did not come."""

from __future__ import annotations

import datetime
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from dynamicemb import CollectiveError, DynamicEmbWarning
from dynamicemb.checkpoint.dcp import load, sized_state_dict
from dynamicemb.checkpoint.dump import DynamicEmbDump
from dynamicemb.checkpoint.incremental import incremental_dump
from dynamicemb.checkpoint.load import DynamicEmbLoad
from dynamicemb.checkpoint.static import load_static
from dynamicemb.shard import collective, table_statistics
from tests.checkpoint.models import contents
from tests.distributed import run_on_ranks
from tests.shard.models import ZEROS, collection, distribute, dynamic, features_of, table, train_step

SGD = (torch.optim.SGD, {"lr": 1.0})


def _model(group: dist.ProcessGroup) -> nn.Module:
    module = distribute(collection(table("t0")), {"t0": dynamic(initializer_args=ZEROS)}, SGD, group=group)
    train_step(module, features_of({"t0": [list(range(dist.get_rank(), 40))]}))
    return module


def _calls(module: nn.Module, folder: str, group: dist.ProcessGroup) -> dict[str, Callable[[], Any]]:
    """Every call that all ranks make together, by what its message calls it. Made by all ranks."""
    state = module.state_dict()
    DynamicEmbDump(f"{folder}/dump", module)
    dcp.save(state, checkpoint_id=f"{folder}/dcp", process_group=group)
    static = {"embeddings.t0.weight": torch.ones(10, 8)}
    return {
        "state_dict()": module.state_dict,
        "load_state_dict()": lambda: module.load_state_dict(dict(state)),
        "DynamicEmbDump()": lambda: DynamicEmbDump(f"{folder}/dump", module),
        "incremental_dump()": lambda: incremental_dump(f"{folder}/delta", module, f"{folder}/dump"),
        "DynamicEmbLoad()": lambda: DynamicEmbLoad(f"{folder}/dump", module),
        "load_static()": lambda: load_static(module, static),
        "dynamicemb.checkpoint.dcp.load()": lambda: load(module, f"{folder}/dcp", process_group=group),
        "sized_state_dict()": lambda: sized_state_dict(module, f"{folder}/dcp", process_group=group),
        "table_statistics()": lambda: table_statistics(module),
    }


def _alone(rank: int, world_size: int, folder: str) -> list[str]:
    """Each call on one rank alone, while the others wait for it elsewhere; afterwards all of them succeed."""
    group = dist.new_group()
    module = _model(group)
    before = contents(module)
    calls = _calls(module, folder, group)
    messages = []
    own_time_out = collective._time_out(group)
    for number, (name, call) in enumerate(calls.items()):
        if rank == number % world_size:
            collective._time_out = lambda _: datetime.timedelta(seconds=0.05)  # type: ignore[assignment]
            with pytest.raises(CollectiveError) as caught:
                call()
            message = str(caught.value)
            assert message.startswith(f"{name} of a model with dynamic tables is collective: all ranks call it"), (
                message
            )
            absent = [str(other) for other in range(world_size) if other != rank]
            assert f"ranks {', '.join(absent)} did not" in message and "within 0.05 s" in message
            assert f"this is rank {rank} of {world_size}" in message
            messages.append(message)
            collective._time_out = lambda _: own_time_out  # type: ignore[assignment]
        dist.barrier()
    assert contents(module) == before
    for call in calls.values():
        call()
        call()
    return messages


def test_a_call_on_one_rank_alone_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    results = run_on_ranks(3, _alone, str(tmp_path))
    assert all(results)


def _others_go_on(rank: int, world_size: int) -> float:
    """What the others do meanwhile, in collectives of the same group, is taken for no answer."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    module = _model(group)
    dist.barrier()  # of the default group, which has time: from here on the ranks are together
    start = time.monotonic()
    if rank == 0:
        with pytest.raises(CollectiveError, match=r"state_dict\(\) .*within 10 s .*rank 1 did not"):
            module.state_dict()
        return time.monotonic() - start
    with pytest.raises(RuntimeError, match=r"(?i)timed out|closed"):
        dist.all_reduce(torch.ones(5, dtype=torch.int64), group=group)
    return 0


def test_the_time_out_is_that_of_the_group_whatever_the_others_do() -> None:
    waited, _ = run_on_ranks(2, _others_go_on)
    assert 9.9 < waited < 60


def _different_calls(rank: int, world_size: int) -> str:
    group = dist.new_group()
    module = _model(group)
    state = module.state_dict()
    dist.barrier()
    collective._time_out = lambda _: datetime.timedelta(seconds=5)  # type: ignore[assignment]
    with pytest.raises(CollectiveError) as caught:
        module.state_dict() if rank == 0 else module.load_state_dict(state)
    return str(caught.value)


def test_different_calls_name_each_other() -> None:
    first, second = run_on_ranks(2, _different_calls)
    assert first.startswith("state_dict()") and second.startswith("load_state_dict()")
    assert "rank 1 called load_state_dict() instead" in first or "rank 0 called state_dict() instead" in second


def _keys_of_meetings(rank: int, world_size: int) -> int:
    """A job that saves every minute leaves nothing behind in the store."""
    group = dist.new_group()
    module = _model(group)
    for _ in range(5):
        table_statistics(module)
    store = dist.distributed_c10d._get_process_group_store(group)
    dist.barrier()
    return sum(store.check([collective._key(number, other)]) for number in range(1, 9) for other in range(world_size))


def test_meetings_leave_nothing_behind() -> None:
    assert run_on_ranks(2, _keys_of_meetings) == [2, 2]


def _dies_in_the_middle(rank: int, world_size: int) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    dist.barrier()  # of the default group, which has time: from here on the ranks are together
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DynamicEmbWarning)
        if rank == 1:
            with pytest.raises(ValueError, match="here"), collective.collective("a call", group):
                raise ValueError("here")
            return
        with (
            pytest.raises(CollectiveError, match="a call failed, since another rank no longer takes part"),
            collective.collective("a call", group),
        ):
            dist.all_reduce(torch.ones(1), group=group)
    with pytest.raises(RuntimeError, match=r"^other$"), collective.collective("a call", None):
        raise RuntimeError("other")


def test_a_rank_that_leaves_in_the_middle() -> None:
    run_on_ranks(2, _dies_in_the_middle)
