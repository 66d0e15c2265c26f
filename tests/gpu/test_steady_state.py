"""A step at capacity makes nobody wait, and launches what is compiled: lookups and updates of one group and several."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import triton

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.group import TableGroup
from tests.gpu.batches import Batch, Feed
from tests.gpu.cases import FEW, Case
from tests.gpu.guards import cached_launches_only, steady_state
from tests.gpu.scale import INTERPRETED, SCALES, Scale
from tests.gpu.twins import look_up

STEPS = 4
#: Steps that compile kernels, and that leave memory in torch's allocator.
WARM_UP = 3


def full_groups(cases: list[Case], scale: Scale) -> tuple[list[TableGroup], list[list[Batch]]]:
    """A group at capacity for each case, and batches for ``WARM_UP + STEPS`` steps, on the device."""
    groups, batches = [], []
    for case in cases:
        feed, group = Feed(case), TableGroup(case.configs(), case.world_size, scale.device)
        for batch in feed.filling(1.25):
            look_up(group, batch)
        kinds = itertools.islice(itertools.cycle((feed.new, feed.mixed, feed.skewed)), WARM_UP + STEPS)
        groups.append(group)
        batches.append([kind().to(scale.device) for kind in kinds])
    return groups, batches


def step(groups: list[TableGroup], batches: list[Batch]) -> None:
    """All lookups, then one backward pass through all of them, a new learning rate, and an evaluation."""
    found = [look_up(group, batch) for group, batch in zip(groups, batches)]
    torch.stack([values.square().sum() for values in found]).sum().backward()
    for group, batch in zip(groups, batches):
        group.set_learning_rate(0, 0.01)
        group.custom_scores.add_(1)
        group.eval_lookup(batch.keys, batch.tables)


def run(cases: list[Case], scale: Scale) -> None:
    with scale.engine():
        groups, batches = full_groups([case if scale.full else case.toy() for case in cases], scale)
        before = [group.counters() for group in groups]
        for number, batches_of_step in enumerate(zip(*batches)):
            if number < WARM_UP:
                step(groups, list(batches_of_step))
                continue
            with steady_state(scale.device):
                step(groups, list(batches_of_step))
    for group, counters in zip(groups, before):
        assert group.steps.tolist() == [WARM_UP + STEPS] * len(group.configs)
        for now, then in zip(group.counters(), counters):
            assert now.hits > then.hits and now.evicted > then.evicted


def case_of(optimizer: OptimizerKind, policy: DynamicEmbEvictStrategy) -> Case:
    small = FEW[0].toy()
    return dataclasses.replace(small, optimizer=optimizer, policy=policy, tables=2, grows=False, rows=8192, batch=2048)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("policy", DynamicEmbEvictStrategy, ids=lambda policy: policy.value)
@pytest.mark.parametrize("optimizer", OptimizerKind, ids=lambda optimizer: optimizer.name.lower())
def test_one_group(optimizer: OptimizerKind, policy: DynamicEmbEvictStrategy, scale: Scale) -> None:
    run([case_of(optimizer, policy)], scale)


@pytest.mark.parametrize("scale", SCALES)
def test_several_groups(scale: Scale) -> None:
    run([dataclasses.replace(case, grows=False) for case in FEW], scale)


# ------------------------------------------------------------------------------------------- the guards


@triton.jit
def _nothing() -> None:
    return


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one path only")
def test_a_launch_on_the_slow_path_is_noticed() -> None:
    with cached_launches_only(), pytest.raises(AssertionError, match="_nothing was launched"):
        _nothing[(1,)]()


@pytest.mark.gpu
def test_a_wait_for_the_device_is_noticed() -> None:
    number = torch.ones(1, device="cuda")
    with steady_state(number.device), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()
    assert number.item() == 1
