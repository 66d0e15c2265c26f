"""A lookup and an update at capacity as a CUDA graph: replayed with other ids, it does what eager steps do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.errors import ConfigError
from dynamicemb.table.function import lookup
from dynamicemb.table.group import TableGroup
from tests.gpu.batches import Batch, Feed
from tests.gpu.cases import FEW, Case
from tests.gpu.guards import cached_launches_only
from tests.gpu.memory import assert_equal_groups, assert_same_bits, garbage_in_new_chunks
from tests.gpu.scale import SCALES, Scale
from tests.gpu.twins import look_up

#: Steps on the capturing stream before the capture.
WARM_UP = 3
Outputs = tuple[torch.Tensor, torch.Tensor]


class Step:
    """A training lookup, its update and an evaluation of the same keys, with inputs and outputs that stay in place."""

    def __init__(self, group: TableGroup, batch: Batch) -> None:
        self.group = group
        self.inputs = batch.to(group.device, copy=True)
        self.gradients = torch.zeros(len(batch.keys), group.storage.layout.dim, device=group.device)

    def fill(self, batch: Batch, gradients: torch.Tensor) -> None:
        for name in ("keys", "tables", "counts"):
            there, given = getattr(self.inputs, name), getattr(batch, name)
            assert (there is None) == (given is None)
            if there is not None:
                there.copy_(given)
        self.gradients.copy_(gradients)

    def __call__(self) -> Outputs:
        batch, group = self.inputs, self.group
        anchor = torch.empty(0, device=group.device, requires_grad=True)
        rows = lookup(group, anchor, batch.keys, batch.tables, batch.counts, training=True)
        rows.backward(self.gradients)
        return rows.detach(), group.eval_lookup(batch.keys, batch.tables)


def captured(step: Step) -> Callable[[], Outputs]:
    """``step`` as a graph, after ``WARM_UP`` steps on a side stream. On the CPU, the steps and ``step`` itself."""
    if step.group.device.type == "cpu":
        for _ in range(WARM_UP):
            step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with cached_launches_only(), torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def prepared(batch: Batch, case: Case) -> Batch:
    """With occurrences exactly where they matter: a graph has the inputs that it was captured with."""
    return batch.counted() if case.policy is DynamicEmbEvictStrategy.LFU else batch


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", [dataclasses.replace(case, grows=False) for case in FEW], ids=str)
def test_replays_equal_eager_steps(case: Case, scale: Scale) -> None:
    case = case if scale.full else case.toy()
    feed, generator = Feed(case), torch.Generator(scale.device).manual_seed(5)
    with garbage_in_new_chunks(), scale.engine():
        eager, replayed = (TableGroup(case.configs(), case.world_size, scale.device) for _ in range(2))
        for batch in feed.filling(1.1):
            look_up(eager, batch)
            look_up(replayed, batch)
        first = prepared(feed.mixed(), case)
        twin, step = Step(eager, first), Step(replayed, first)
        replay = captured(step)
        for _ in range(WARM_UP):
            twin()
        assert_equal_groups(eager, replayed, "after the capture")
        for number, kind in enumerate((feed.new, feed.skewed, feed.dominated, feed.mixed, feed.new)):
            batch = prepared(kind(), case)
            gradients = torch.randn(step.gradients.shape, generator=generator, device=scale.device)
            for group in (eager, replayed):
                group.set_learning_rate(0, 0.05 + 0.01 * number)
                group.custom_scores.fill_(number - 2)
            twin.fill(batch, gradients)
            step.fill(batch, gradients)
            for wanted, got, what in zip(twin(), replay(), ("training", "evaluation")):
                assert_same_bits(wanted, got, f"rows of {what} {number}")
            assert_equal_groups(eager, replayed, f"after replay {number}")
    assert eager.steps.tolist() == [WARM_UP + 5] * case.tables
    assert all(counters.evicted > 0 and counters.hits > 0 for counters in eager.counters())


@pytest.mark.gpu
def test_a_table_that_can_still_grow_is_refused() -> None:
    case = dataclasses.replace(FEW[0], grows=True)
    feed, group = Feed(case), TableGroup(case.configs(), case.world_size, torch.device("cuda"))
    batch = prepared(feed.mixed(), case)
    step = Step(group, batch)
    assert group.storage.growable
    with pytest.raises(ConfigError, match="CUDA graph cannot make a table grow"):
        captured(step)
