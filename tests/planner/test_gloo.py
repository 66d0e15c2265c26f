"""The end of a process that is joined to others by gloo."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import typer
from torchrec.distributed.planner.types import PlannerError

from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.cli.model import sharded_model
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, gloo
from dynamicemb.shard.agreement import gathered
from tests.distributed import run_on_ranks
from tests.planner.models import Model, sharders, topology
from tests.shard.alone import alone, no_process_group
from tests.shard.models import ZEROS, collection, distribute, dynamic, table


def registered_by(action: Callable[[], object]) -> list[Callable[[], object]]:
    registered: list[Callable[[], object]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atexit, "register", registered.append)
        action()
    return registered


def shard() -> torch.nn.Module:
    return distribute(collection(table("item")), {"item": dynamic(initializer_args=ZEROS)})


def register_once(rank: int, world_size: int) -> None:
    with no_process_group():
        assert registered_by(alone) == [], "without a group there are no threads of gloo"
    (hook,) = registered_by(shard)
    assert registered_by(shard) == [] and registered_by(lambda: gloo.let_threads_finish_at_exit(dist.group.WORLD)) == []
    with pytest.MonkeyPatch.context() as patch:
        slept: list[float] = []
        patch.setattr(time, "sleep", slept.append)
        hook()
    assert slept == [0.05], "what gives up Python's lock"


def test_the_hook_is_registered_once_where_a_collection_is_sharded_over_gloo() -> None:
    run_on_ranks(1, register_once)


def refuse_plan() -> None:
    tiny = topology(world_size=2, hbm_cap=1024, ddr_cap=1024)
    with pytest.raises(PlannerError):
        DynamicEmbeddingShardingPlanner(topology=tiny).collective_plan(Model(), sharders())


def make_no_model() -> None:
    with pytest.raises(typer.BadParameter), sharded_model("tests.cli.models:nothing"):
        pass


#: What may be the first collective of a process, and its last one.
FIRST_COLLECTIVES: dict[str, Callable[[], object]] = {
    "a plan that is refused": refuse_plan,
    "what the ranks of a plan agree on": lambda: gathered(1, dist.group.WORLD),
    "a checkpoint's ranks": lambda: Ranks(dist.group.WORLD).gather(1),
    "a model's function of the command, whatever it calls": make_no_model,
}


def register_with_the_first(rank: int, world_size: int, first: str) -> None:
    assert registered_by(FIRST_COLLECTIVES[first]) == [gloo._give_up_lock]


@pytest.mark.parametrize("first", FIRST_COLLECTIVES)
def test_the_hook_comes_with_the_first_collective_whatever_follows(first: str) -> None:
    run_on_ranks(2, register_with_the_first, first)


def test_no_hook_for_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for backends, expected in (("cuda:nccl", 0), ("cpu:gloo,cuda:nccl", 1), ("cpu:gloo", 1)):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, backends=backends: backends)
        gloo._register.cache_clear()
        assert len(registered_by(lambda: gloo.let_threads_finish_at_exit(object()))) == expected
    gloo._register.cache_clear()
