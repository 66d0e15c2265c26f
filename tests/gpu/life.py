"""The whole life of a group of tables, on two engines: it fills and grows, evicts at capacity, meets keys that repeat,
refuses some, evaluates absent ones, expands rows from elsewhere, and has lookups that overlap."""

from __future__ import annotations

import itertools

from tests.gpu.batches import Feed
from tests.gpu.cases import Case
from tests.gpu.memory import garbage_in_new_chunks
from tests.gpu.scale import Scale
from tests.gpu.twins import Twins

__all__ = ["SCORES", "live"]

#: Scores of CUSTOMIZED, one for each lookup in turn; they use all 64 bits.
SCORES = (0, 2**63 - 100, -(2**63), 3, -5)


def live(case: Case, scale: Scale) -> None:
    """Drives ``case`` (its toy if the scale is not full) through all phases, and compares every byte after each."""
    case = case if scale.full else case.toy()
    with garbage_in_new_chunks():
        twins = _live(case, Feed(case), Twins(case, scale))
    for table, counters in enumerate(twins.expected.counters()):
        assert min(counters.size, counters.hits, counters.evicted) > 0, f"table {table}: {counters}"
        # Two crowds, each with twice the keys that fit.
        assert table > 0 or counters.refused >= 2 * case.bucket_capacity, counters


def _live(case: Case, feed: Feed, twins: Twins) -> Twins:
    scores = itertools.cycle(SCORES)
    slots_at_first = _slots(twins)
    for batch in feed.filling(1.1):
        twins.set_scores(next(scores))
        twins.train(batch)
    twins.compare("when full")
    assert case.grows == (_slots(twins) > slots_at_first)

    for kind in (feed.mixed, feed.new, feed.skewed):
        twins.set_scores(next(scores))
        twins.train(kind())
    twins.compare("after evictions")

    twins.set_learning_rate(0, 0.125)
    for kind in (feed.dominated, feed.crowded, feed.empty):
        twins.train(kind())
    twins.compare("after keys that repeat and keys that were refused")

    rows = twins.evaluate(feed.half_absent())
    # A group of several tables has an evaluation initializer.
    assert rows.any(1).all() if case.tables > 1 else not rows[::2].any()
    for kind in (feed.skewed, feed.dominated, feed.empty):
        twins.exchange(kind())
    twins.compare("after lookups that change nothing")

    # The second lookup evicts keys of the first.
    first, second = twins.lookup(feed.crowded(1)), twins.lookup(feed.crowded(2))
    twins.update(second)
    twins.update(first)
    twins.compare("after lookups that overlap")
    if twins.expected.storage.num_bytes < 2**30:  # a copy takes three times the memory
        twins.compare_stored_rows()
    return twins


def _slots(twins: Twins) -> int:
    return sum(size.slots for size in twins.expected.storage.geometries)
