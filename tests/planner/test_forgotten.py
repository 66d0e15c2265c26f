"""A class of dynamicemb is forgotten, or the flag is: never a static table, always the name of what is missing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import get_default_sharders

from dynamicemb import ConfigError, DynamicEmbTableOptions
from dynamicemb.planner import (
    DynamicEmbeddingEnumerator,
    DynamicEmbeddingShardingPlanner,
    DynamicEmbParameterConstraints,
    DynamicEmbParameterSharding,
)
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from tests.planner.models import BATCH_SIZE, Model, dynamic, sharders, topology

PLANNER = (
    "table 'item' has use_dynamicemb=True and is being planned by torchrec's own .*DynamicEmbeddingShardingPlanner"
)


def assigned(**fields: Any) -> DynamicEmbParameterConstraints:
    """The flag set by assignment."""
    constraint = DynamicEmbParameterConstraints(**fields)
    constraint.use_dynamicemb = True
    return constraint


FLAGGED = [
    dynamic(),
    assigned(),
    dynamic(sharding_types=["row_wise"]),
    dynamic(compute_kernels=["customized_kernel"]),
    assigned(dynamicemb_options=DynamicEmbTableOptions(seed=1)),
    dataclasses.replace(dynamic(), pooling_factors=[2.0]),
    copy.deepcopy(dynamic()),
    pickle.loads(pickle.dumps(dynamic())),
]


@pytest.mark.parametrize("constraint", FLAGGED)
@pytest.mark.parametrize(
    "chosen", [[DynamicEmbeddingCollectionSharder()], [EmbeddingCollectionSharder()], get_default_sharders()]
)
def test_torchrecs_planner(constraint: ParameterConstraints, chosen: list) -> None:
    constraints = {"user": ParameterConstraints(), "item": constraint}
    with pytest.raises(ConfigError, match=PLANNER):
        EmbeddingShardingPlanner(topology=topology(), constraints=constraints).plan(Model(), chosen)


def test_torchrecs_enumerator_and_its_subclasses() -> None:
    class Own(EmbeddingEnumerator):
        def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], *args: Any) -> list[str]:
            return ["row_wise"]

    class OwnKernels(EmbeddingEnumerator):
        def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], *args: Any) -> list[str]:
            return ["fused"]

    constraints = {"item": dynamic()}
    for kind in (EmbeddingEnumerator, Own, OwnKernels):
        with pytest.raises(ConfigError, match=PLANNER):
            kind(topology(), BATCH_SIZE, constraints).enumerate(Model(), sharders())
        with pytest.raises(ConfigError, match="use DynamicEmbeddingEnumerator, or leave enumerator out"):
            DynamicEmbeddingShardingPlanner(
                topology=topology(), enumerator=kind(topology(), BATCH_SIZE, constraints), constraints=constraints
            )


@pytest.mark.parametrize("of_planner", [None, {"item": dynamic()}])
def test_torchrecs_planner_with_our_enumerator(of_planner: dict | None) -> None:
    enumerator = DynamicEmbeddingEnumerator(topology(), BATCH_SIZE, {"item": dynamic()})
    planner = EmbeddingShardingPlanner(topology=topology(), enumerator=enumerator, constraints=of_planner)
    with pytest.raises(ConfigError, match=r"\['item'\].* EmbeddingShardingPlanner; use .*DynamicEmbeddingShardingPlan"):
        planner.plan(Model(), sharders())
    assert enumerator.enumerate(Model(), sharders()), "who asks the enumerator alone gets its options"
    static = DynamicEmbeddingEnumerator(topology(), BATCH_SIZE, {"item": ParameterConstraints()})
    EmbeddingShardingPlanner(topology=topology(), enumerator=static).plan(Model(), sharders())


@pytest.mark.parametrize("planner", [DynamicEmbeddingShardingPlanner, EmbeddingShardingPlanner])
@pytest.mark.parametrize("flag", [False, None])
def test_options_without_the_flag(planner: type[EmbeddingShardingPlanner], flag: bool | None) -> None:
    constraint = DynamicEmbParameterConstraints(use_dynamicemb=flag, dynamicemb_options=DynamicEmbTableOptions())
    with pytest.raises(ConfigError, match="table 'item': dynamicemb_options are given without use_dynamicemb=True"):
        planner(topology=topology(), constraints={"item": constraint}).plan(Model(), sharders())
    constraint.use_dynamicemb = True
    plan = DynamicEmbeddingShardingPlanner(topology=topology(), constraints={"item": constraint})
    assert isinstance(plan.plan(Model(), sharders()).plan["wide"]["item"], DynamicEmbParameterSharding)


@pytest.mark.parametrize(
    ("field", "value"), [("use_dynamicemb", True), ("dynamicemb_options", DynamicEmbTableOptions())]
)
def test_a_flag_on_torchrecs_constraints(field: str, value: object) -> None:
    constraint = ParameterConstraints()
    setattr(constraint, field, value)
    with pytest.raises(ConfigError, match=r"are a ParameterConstraints, .*use DynamicEmbParameterConstraints"):
        DynamicEmbeddingShardingPlanner(topology=topology(), constraints={"item": constraint}).plan(Model(), sharders())


@pytest.mark.parametrize("flag", ["yes", 1, "False", [True]])
def test_a_flag_that_is_none(flag: Any) -> None:
    constraints = {"item": DynamicEmbParameterConstraints(use_dynamicemb=flag)}
    with pytest.raises(ConfigError, match=r"table 'item': use_dynamicemb=.*; use True or False"):
        DynamicEmbeddingShardingPlanner(topology=topology(), constraints=constraints).plan(Model(), sharders())


def test_a_flag_that_is_set_after_the_planner_was_made() -> None:
    constraint = DynamicEmbParameterConstraints()
    planner = DynamicEmbeddingShardingPlanner(topology=topology(), constraints={"item": constraint})
    constraint.use_dynamicemb = True
    assert isinstance(planner.plan(Model(), sharders()).plan["wide"]["item"], DynamicEmbParameterSharding)


def test_fields_of_a_dynamic_table_can_be_read_by_everybody_else() -> None:
    constraint = dynamic(sharding_types=["row_wise"])
    assert (constraint.sharding_types, constraint.compute_kernels) == (["row_wise"], None)
    assert "sharding_types=['row_wise'], compute_kernels=None" in repr(constraint)
    assert dataclasses.asdict(constraint)["sharding_types"] == ["row_wise"]
    positional = DynamicEmbParameterConstraints(["table_wise"], ["fused"])
    assert (positional.sharding_types, positional.compute_kernels) == (["table_wise"], ["fused"])
    plan = EmbeddingShardingPlanner(topology=topology(), constraints={"item": positional}).plan(Model(), sharders())
    assert plan.plan["wide"]["item"].sharding_type == "table_wise", "without the flag they are torchrec's"


def test_a_table_that_torchrec_leaves_out_of_the_plan() -> None:
    for group, planned in (("cuda", False), ("cpu", True)):
        planner = DynamicEmbeddingShardingPlanner(
            topology=topology(), constraints={"item": dynamic(device_group=group)}
        )
        if planned:
            assert "item" in planner.plan(Model(), sharders()).plan["wide"]
            continue
        with pytest.raises(
            ConfigError, match="table 'item' has use_dynamicemb=True, and torchrec's planner left it out"
        ):
            planner.plan(Model(), sharders())
