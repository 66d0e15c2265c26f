"""The constraint class itself: defaults, equality, hash, and what may stand beside the flag."""

import copy
import pickle

import pytest
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import BoundsCheckMode, KeyValueParams

from dynamicemb import ConfigError, DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbParameterConstraints, DynamicEmbParameterSharding
from dynamicemb.planner.constraints import check_constraint, dynamic_options
from tests.planner.models import dynamic


def test_defaults_are_a_static_table():
    constraint = DynamicEmbParameterConstraints()
    assert isinstance(constraint, ParameterConstraints)
    assert (constraint.use_dynamicemb, constraint.dynamicemb_options) == (False, None)
    assert dynamic_options({"item": constraint, "user": ParameterConstraints(), "tag": dynamic()}) == {"tag": None}
    assert dynamic_options(None) == {}
    assert dynamic_options({"item": DynamicEmbParameterConstraints(use_dynamicemb=None)}) == {}


def test_equality_and_hash_include_our_fields():
    distinct = [
        DynamicEmbParameterConstraints(),
        dynamic(),
        dynamic(DynamicEmbTableOptions()),
        dynamic(DynamicEmbTableOptions(seed=1)),
        dynamic(pooling_factors=[2.0]),
    ]
    for first in distinct:
        assert hash(first) == hash(copy.deepcopy(first))
        assert first == copy.deepcopy(first)
        assert pickle.loads(pickle.dumps(first)) == first
        assert sum(first == second for second in distinct) == 1
        assert sum(hash(first) == hash(second) for second in distinct) == 1
    assert len({*distinct, *copy.deepcopy(distinct)}) == len(distinct)


@pytest.mark.parametrize(
    "constraint",
    [
        None,
        ParameterConstraints(compute_kernels=["fused"]),
        ParameterConstraints(compute_kernels=["fused", "customized_kernel"]),
        dynamic(),
        dynamic(sharding_types=["row_wise"]),
        dynamic(sharding_types=["table_wise", "row_wise"]),
        dynamic(compute_kernels=["customized_kernel"]),
        dynamic(compute_kernels=["fused", "customized_kernel"]),
        dynamic(enforce_hbm=True, bounds_check_mode=BoundsCheckMode.NONE, pooling_factors=[5], num_poolings=[1]),
    ],
)
def test_what_may_be_said(constraint):
    check_constraint("item", constraint)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (dynamic(sharding_types=["table_wise"]), r"sharding_types=\['table_wise'\] .*'row_wise'.* add it"),
        (dynamic(compute_kernels=["fused"]), r"compute_kernels=\['fused'\] .*'customized_kernel'.* add it"),
        (dynamic(use_virtual_table=True), "use_virtual_table=True .* remove one of the two"),
        (dynamic(key_value_params=KeyValueParams()), "key_value_params=.* remove one of the two"),
        (dynamic(options={"seed": 1}), r"dynamicemb_options=.* is a dict; use DynamicEmbTableOptions"),
        (ParameterConstraints(compute_kernels=["customized_kernel"]), ".* is not dynamic; use DynamicEmbParam"),
        (DynamicEmbParameterConstraints(compute_kernels=["customized_kernel"]), ".*use_dynamicemb=True"),
    ],
)
def test_what_may_not_be_said(constraint, message):
    with pytest.raises(ConfigError, match=f"table 'item': {message}"):
        check_constraint("item", constraint)


def test_parameter_sharding_carries_the_options():
    options = DynamicEmbTableOptions(dim=16, max_capacity=128)
    sharding = DynamicEmbParameterSharding(
        sharding_type="row_wise", compute_kernel="customized_kernel", ranks=[0, 1], dynamicemb_options=options
    )
    assert sharding.get_additional_fused_params() == {"dynamicemb_options": options}
    assert pickle.loads(pickle.dumps(sharding)) == sharding
    with pytest.raises(TypeError, match="dynamicemb_options"):
        DynamicEmbParameterSharding(sharding_type="row_wise", compute_kernel="customized_kernel")
