"""Lookups and backward passes in any order: gradients find the rows that they belong to, or nothing."""

from __future__ import annotations

import torch

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.filling import HostRows, TableFilling
from dynamicemb.table.optimizers import OptimizerConfig
from tests.oracle import colliding_keys, mix64
from tests.table.groups import DIM, NORMAL, config, group_of, keys_and_tables, read, train

#: All in one bucket of eight.
SAME = colliding_keys(0, 1, 0.5, None, 24)


def test_backward_in_the_other_order() -> None:
    group = group_of()
    first, second = train(group, [1, 2]), train(group, [2, 3])
    (second.sum() * 10).backward()
    first.sum().backward()
    assert read(group, [1, 2, 3]) == [-1.0, -11.0, -10.0]


def test_growth_of_another_table_in_between() -> None:
    group = group_of(config("still"), config("growing", capacity=4096, init_capacity=8))
    first = train(group, [1, 2, 3])
    train(group, range(500), table=1).sum().backward()
    first.sum().backward()
    assert read(group, [1, 2, 3]) == [-1.0, -1.0, -1.0]
    assert read(group, [1, 2, 3], table=1) == [-1.0, -1.0, -1.0]


def test_eviction_in_between() -> None:
    """Five keys are evicted by the second lookup; their gradients must not reach the rows of those that came."""
    group = group_of(config(capacity=8))
    first = train(group, SAME[:8])
    second = train(group, SAME[8:13])
    first.sum().backward()
    evicted = sorted(SAME[:8])[:5]  # all scores are equal
    assert read(group, SAME[:8]) == [0.0 if key in evicted else -1.0 for key in SAME[:8]]
    assert read(group, SAME[8:13]) == [0.0] * 5
    second.sum().backward()
    assert read(group, SAME[8:13]) == [-1.0] * 5
    assert group.counters()[0].evicted == 5


def test_other_rows_are_loaded_in_between() -> None:
    """They lie where those of the lookup were."""
    group = group_of(config(capacity=8))
    first = train(group, SAME[:8])
    filling = TableFilling(group, 0, rows=8)
    loaded = torch.tensor(sorted(SAME[8:16], key=mix64))
    filling.add(HostRows(loaded, torch.zeros_like(loaded), torch.ones(8, DIM), {}))
    filling.finish()
    group.restore(0, group.progress(0), filling.kept)
    first.sum().backward()
    assert read(group, SAME[8:16]) == [1.0] * 8


def test_refused_keys_take_no_update_though_they_come_in_later() -> None:
    group = group_of(config(capacity=8))
    first = train(group, SAME[:10])
    stored = group.stored_rows(0).keys.tolist()
    refused = [key for key in SAME[:10] if key not in stored]
    second = train(group, refused)
    first.sum().backward()
    assert read(group, refused) == [0.0, 0.0], "what was read as zeros was not theirs"
    (second.sum() * 3).backward()
    assert read(group, refused) == [-3.0, -3.0]


def test_one_lookup_in_two_losses_is_one_update() -> None:
    group = group_of(config(optimizer=OptimizerConfig(kind=OptimizerKind.ADAGRAD, learning_rate=1.0, eps=0.0)))
    rows = train(group, [1])
    (rows.sum() + 3 * rows.sum()).backward()
    assert read(group, [1]) == [-1.0]
    assert group.steps.tolist() == [1]
    assert group.stored_rows(0).states["sum"].tolist() == [[16.0] * 4]


def test_training_without_gradients() -> None:
    """Under no_grad keys are inserted and touched; there is nothing to go back from."""
    group = group_of(config(evict_strategy=DynamicEmbEvictStrategy.LFU, initializer=NORMAL))
    with torch.no_grad():
        rows = train(group, [5, 5, 6])
    assert not rows.requires_grad and rows.any()
    stored = group.stored_rows(0)
    assert dict(zip(stored.keys.tolist(), stored.scores.tolist())) == {5: 2, 6: 1}
    assert group.steps.tolist() == [0] and group.clock.tolist() == [1]
    assert train(group, [5]).requires_grad


def test_parts_of_the_rows() -> None:
    """Rows that the loss does not use have a gradient of zero."""
    group = group_of()
    rows = train(group, [1, 2, 3])
    rows[1].sum().backward()
    assert read(group, [1, 2, 3]) == [0.0, -1.0, 0.0]


def test_gradients_of_any_layout() -> None:
    group = group_of()
    rows = train(group, [1, 2, 3])
    rows.backward(torch.arange(12.0).view(4, 3).t())
    assert torch.equal(group.eval_lookup(*keys_and_tables([1, 2, 3])), -torch.arange(12.0).view(4, 3).t())
    rows = train(group, [4, 5])
    rows.backward(torch.ones(1, 1).expand(2, 4))
    assert read(group, [4, 5]) == [-1.0, -1.0]


def test_threads_change_nothing() -> None:
    """Batches large enough to be divided among threads."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(40_000, generator=generator) ** 2 * 30_000).long() for _ in range(3)]
    gradients = torch.randn(40_000, 4, generator=generator)
    stored = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            group = group_of(config(capacity=20_000, init_capacity=1_000, bucket_capacity=128, initializer=NORMAL))
            for batch in batches:
                train(group, batch.tolist()).backward(gradients)
            stored.append((vars(group.stored_rows(0)), group.counters()))
    finally:
        torch.set_num_threads(threads)
    first, counters = stored[0]
    assert counters[0].evicted > 0
    for other, other_counters in stored[1:]:
        assert all(torch.equal(first[name], other[name]) for name in ("keys", "slots", "scores", "embeddings"))
        assert counters == other_counters
