"""One result: two runs are equal to the bit, and so is a run in which the keys of each batch come in another order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynamicemb.table.group import TableGroup
from tests.gpu.batches import Batch, Feed
from tests.gpu.cases import FEW, Case
from tests.gpu.life import SCORES
from tests.gpu.memory import assert_equal_groups, assert_same_bits, garbage_in_new_chunks
from tests.gpu.scale import SCALES, Scale
from tests.gpu.twins import look_up

pytestmark = [pytest.mark.parametrize("case", FEW, ids=str), pytest.mark.parametrize("scale", SCALES)]


def batches(case: Case) -> Iterator[Batch]:
    """Growth, evictions, duplicates and refused keys."""
    feed = Feed(case)
    yield from feed.filling(1.1)
    for kind in (feed.mixed, feed.crowded, feed.skewed, feed.dominated, feed.new, feed.mixed):
        yield kind()


def run_twice(case: Case, scale: Scale, shuffled: bool) -> None:
    """Two groups side by side; the second one gets its batches ``shuffled`` or as they are."""
    case = case if scale.full else case.toy()
    generator = torch.Generator(scale.device).manual_seed(7)
    with garbage_in_new_chunks(), scale.engine():
        first, second = (TableGroup(case.configs(), case.world_size, scale.device) for _ in range(2))
        for step, batch in enumerate(batches(case)):
            first.custom_scores.fill_(SCORES[step % len(SCORES)])
            second.custom_scores.copy_(first.custom_scores)
            batch = batch.to(scale.device)
            size = len(batch.keys)
            if shuffled:  # whole numbers have exact sums in any order
                gradients = torch.randint(-3, 4, (size, case.dim), generator=generator, device=scale.device).float()
                order = torch.randperm(size, generator=generator, device=scale.device)
            else:
                gradients = torch.randn(size, case.dim, generator=generator, device=scale.device)
                order = torch.arange(size, device=scale.device)
            rows, other_rows = look_up(first, batch), look_up(second, batch.permuted(order))
            assert_same_bits(rows.detach()[order], other_rows.detach(), f"rows of lookup {step}")
            rows.backward(gradients)
            other_rows.backward(gradients[order])
            assert_equal_groups(first, second, f"after step {step}")
    assert all(counters.evicted > 0 for counters in first.counters())


def test_two_runs_are_equal(case: Case, scale: Scale) -> None:
    run_twice(case, scale, shuffled=False)


def test_the_order_in_a_batch_does_not_matter(case: Case, scale: Scale) -> None:
    run_twice(case, scale, shuffled=True)
