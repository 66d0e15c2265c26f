"""One rank decides, every rank learns, also of an error."""

import pytest
import torch.distributed as dist
from torchrec.distributed.planner.types import PlannerError

from dynamicemb import ConfigError, DynamicEmbTableOptions
from dynamicemb.errors import RemoteRankError
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterSharding
from dynamicemb.planner.collective import decide_on_first_rank
from tests.distributed import run_on_ranks
from tests.planner.models import BATCH_SIZE, Model, dynamic, sharders, topology


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def _raise(error):
    raise error


def _caught(group, error):
    try:
        decide_on_first_rank(group, lambda: _raise(error))
    except Exception as caught:
        return type(caught), str(caught)
    return None


def _plan(constraints, **arguments):
    arguments.setdefault("batch_size", BATCH_SIZE)
    return DynamicEmbeddingShardingPlanner(constraints=constraints, **arguments).collective_plan(Model(), sharders())


def _work(rank, world_size):
    results = {"rank": rank}
    # The planner's own topology, from the process group, and TorchRec's default sharders.
    plan = DynamicEmbeddingShardingPlanner(constraints={"item": dynamic()}).collective_plan(Model()).plan
    assert isinstance(plan["wide"]["item"], DynamicEmbParameterSharding)
    results["plan"] = plan
    # torchrec keeps plans under this: it must not depend on the process's seed of str hashes.
    results["hash"] = dynamic(DynamicEmbTableOptions(seed=3)).__hash__()
    with pytest.raises(ConfigError) as config_error:
        _plan({"itm": dynamic()})
    results["unknown table"] = str(config_error.value)
    with pytest.raises(PlannerError) as planner_error:
        _plan({"item": dynamic()}, topology=topology(world_size, ddr_cap=1000))
    results["no memory"] = (planner_error.value.error_type, str(planner_error.value))
    results["unpicklable"] = _caught(dist.group.WORLD, UnpicklableError("a", "b"))
    # Groups without the first of all ranks.
    alone, others = dist.new_group([0]), dist.new_group([1, 2])
    results["decided by"] = decide_on_first_rank(others if rank else alone, lambda: rank)
    return results


def test_three_ranks():
    results = run_on_ranks(3, _work)
    assert [result.pop("rank") for result in results] == [0, 1, 2]
    assert [result.pop("decided by") for result in results] == [0, 1, 1]
    errors = [result.pop("unpicklable") for result in results]
    assert errors[0] == (UnpicklableError, "a and b")
    assert errors[1] == errors[2] == (RemoteRankError, "UnpicklableError on the first rank: a and b")
    first = results[0]
    assert "did you mean 'item'" in first["unknown table"]
    assert "'item': " in first["no memory"][1]
    assert results == [first] * 3
