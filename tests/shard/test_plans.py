"""Plans that are not for these ranks or not for this model, and collections that torchrec's own sharder gets."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ParameterSharding, ShardingPlan
from torchrec.modules.embedding_configs import DataType

from dynamicemb import ConfigError, DynamicEmbTableOptions
from dynamicemb.errors import RemoteRankError
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterSharding
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from dynamicemb.shard.plan_check import checked_plan
from tests.distributed import run_on_ranks
from tests.shard.models import CPU, collection, dynamic, features_of, table, train_step

TABLES = ("item", "user")


def model(**fields: Any) -> torch.nn.Module:
    first = table("item", **{key: fields.pop(key) for key in ("num_embeddings", "dim") if key in fields})
    for name, value in fields.items():
        setattr(first, name, value)
    return collection(first, table("user", dim=first.embedding_dim))


def planner(world_size: int) -> DynamicEmbeddingShardingPlanner:
    place = Topology(world_size=world_size, local_world_size=world_size, compute_device="cpu")
    constraints = {"item": dynamic(), "user": dynamic(seed=1)}
    return DynamicEmbeddingShardingPlanner(topology=place, constraints=constraints, debug=False)


def plan_for(world_size: int, module: torch.nn.Module | None = None) -> ShardingPlan:
    """As it comes out of a file of another job."""
    plan = planner(world_size).plan(module or model(), [DynamicEmbeddingCollectionSharder()])
    return pickle.loads(pickle.dumps(plan))


def shard(plan: ShardingPlan, module: torch.nn.Module | None = None, sharders: list | None = None) -> Any:
    sharders = [DynamicEmbeddingCollectionSharder()] if sharders is None else sharders
    return DistributedModelParallel(module or model(), device=CPU, plan=plan, sharders=sharders)


def edited(change: Callable[[dict[str, ParameterSharding]], None]) -> ShardingPlan:
    plan = plan_for(dist.get_world_size())
    change(plan.plan[""])  # type: ignore[arg-type]
    return plan


def replaced(**fields: Any) -> ShardingPlan:
    def change(entries: dict[str, ParameterSharding]) -> None:
        entries["item"] = dataclasses.replace(entries["item"], **fields)

    return edited(change)


def without_options(entries: dict[str, ParameterSharding]) -> None:
    names = [field.name for field in dataclasses.fields(ParameterSharding)]
    entries["item"] = ParameterSharding(**{name: getattr(entries["item"], name) for name in names})


def exchanged(entries: dict[str, ParameterSharding]) -> None:
    entries["item"], entries["user"] = entries["user"], entries["item"]


def refused(message: str, attempt: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        attempt()


def check_refusals(rank: int, world_size: int) -> None:
    other = 4 if world_size == 1 else 1
    refused(f"'item' is planned for {other} ranks and being sharded on {world_size}", lambda: shard(plan_for(other)))
    for fields, message in (
        ({"dim": 16}, "plan does not fit the model: .*dim=8 is not the model's embedding_dim=16"),
        ({"num_embeddings": 999}, "planned with num_embeddings=1000, and the model's is 999"),
        ({"data_type": DataType.FP16}, "planned with data_type=.*FP32.*, and the model's is .*FP16"),
        ({"name": "things"}, "'things' is not in the plan"),
    ):
        refused(message, lambda fields=fields: shard(plan_for(world_size), model(**fields)))
    refused(
        "the dynamic table 'user', and the collection has only",
        lambda: shard(plan_for(world_size), collection(table("item"))),
    )
    refused("planned as table_wise with kernel", lambda: shard(replaced(sharding_type="table_wise")))
    refused("planned as row_wise with kernel fused;", lambda: shard(replaced(compute_kernel="fused")))
    refused("without their options, as torchrec's", lambda: shard(edited(without_options)))
    bad = DynamicEmbTableOptions(max_capacity=128, init_capacity=128, bucket_capacity=256)
    object.__setattr__(bad, "init_capacity", 10**6)
    refused("does not fit the model: .*init_capacity", lambda: shard(replaced(dynamicemb_options=bad)))
    refused("'item' is planned with table=user,", lambda: shard(edited(exchanged)))
    refused("'item' is planned for 5 ranks", lambda: shard(replaced(sharding_spec=None, ranks=list(range(5)))))
    for sharders in ([EmbeddingCollectionSharder()], None):  # None: torchrec's default sharders
        refused(
            "makes table 'item' dynamic, and torchrec's own sharder.*DynamicEmbeddingCollectionSharder",
            lambda sharders=sharders: DistributedModelParallel(
                model(), device=CPU, plan=plan_for(world_size), sharders=sharders
            ),
        )


def check_different_plans(rank: int, world_size: int) -> None:
    mine = plan_for(world_size)
    if rank == 1:
        mine = plan_for(3)
    with pytest.raises(ConfigError if rank == 1 else RemoteRankError, match="'item' is planned for 3 ranks"):
        shard(mine)
    mine = replaced(dynamicemb_options=DynamicEmbTableOptions(seed=rank))
    refused(r"ranks 0 and 1 have different plans for the tables \['item'\]", lambda: shard(mine))


def check_planning(world_size: int) -> None:
    sharders = [DynamicEmbeddingCollectionSharder()]
    refused(
        f"world_size=4, and the process group has {world_size} ranks; .*world_size={world_size}",
        lambda: planner(4).collective_plan(model(), sharders),
    )
    # A plan for each half of the ranks, as 2D parallelism has it, is no plan for all of them.
    part = planner(1).collective_plan(model(), sharders)
    if world_size > 1:
        refused("is planned for 1 ranks and being sharded on 2", lambda: shard(part))


def check_ranks_of_a_replica(rank: int, world_size: int) -> None:
    """With 2D parallelism tables are divided over the ranks of one replica, here of a single rank."""
    own = [dist.new_group([member]) for member in range(world_size)][rank]
    env: Any = types.SimpleNamespace(process_group=dist.group.WORLD, sharding_pg=own)
    entries: Any = plan_for(1).plan[""]
    assert checked_plan(model(), entries, env).keys() == entries.keys()
    if world_size > 1:
        entries = plan_for(world_size).plan[""]
        refused("is planned for 2 ranks and being sharded on 1", lambda: checked_plan(model(), entries, env))


def check_what_is_accepted(world_size: int) -> None:
    plan = plan_for(world_size)
    before = copy.deepcopy(plan)
    trained = shard(plan)
    assert plan.plan == before.plan
    assert train_step(trained, features_of({"item": [[1, 2]], "user": [[3]]}))["item"].shape == (2, 8)
    # A plan of a release that did not note the size of the table, and one whose options are only those of the user.
    for fields in ({"num_embeddings": None, "data_type": None}, {"dynamicemb_options": DynamicEmbTableOptions(seed=3)}):
        hand_made = replaced(**fields)
        shard(hand_made)
    entry = plan.plan[""]["item"]  # type: ignore[index]
    assert isinstance(entry, DynamicEmbParameterSharding)
    assert (entry.planned_ranks, entry.num_embeddings, entry.data_type) == (world_size, 1000, DataType.FP32)


def work(rank: int, world_size: int) -> None:
    check_what_is_accepted(world_size)
    check_refusals(rank, world_size)  # also by torchrec's sharder, although ours has been at work in this process
    check_planning(world_size)
    check_ranks_of_a_replica(rank, world_size)
    if world_size > 1:
        check_different_plans(rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_plans(world_size: int) -> None:
    run_on_ranks(world_size, work)
