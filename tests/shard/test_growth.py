"""A table that begins small becomes the table that was made at full size."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torchrec.optim import RowWiseAdagrad

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    NORMAL,
    collection,
    distribute,
    dynamic,
    evaluated,
    groups,
    local_table,
    one_sample,
    rows,
    table,
)

STEPS = 15
# Buckets wide enough that none is ever full, so that nothing is evicted and every row can be compared.
MAX_CAPACITY, BUCKET = 1500, 128
ALL_IDS = torch.arange(-450, 450)


def build(world_size: int, init_capacity: int | None) -> nn.Module:
    max_capacity = MAX_CAPACITY // world_size
    options = {
        "max_capacity": max_capacity, "init_capacity": init_capacity, "bucket_capacity": BUCKET,
        "initializer_args": NORMAL, "eval_initializer_args": NORMAL,
    }  # fmt: skip
    constraints = {
        "item": dynamic(evict_strategy=DynamicEmbEvictStrategy.LFU, max_load_factor=0.6, **options),
        "full": dynamic(evict_strategy=DynamicEmbEvictStrategy.LFU, max_capacity=max_capacity, bucket_capacity=BUCKET),
    }
    optimizer = (RowWiseAdagrad, {"lr": 0.5, "eps": 1e-8})
    return distribute(collection(table("item"), table("full")), constraints, optimizer)


def train(model: nn.Module, rank: int, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    ids = ALL_IDS[torch.randint(0, 60 * (step + 1), (80,), generator=generator)]
    output = rows(model, one_sample({"item": ids, "full": ids}))
    torch.stack([values.sin().sum() for values in output.values()]).sum().backward()
    return {name: values.detach().clone() for name, values in output.items()}


def grow(rank: int, world_size: int) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("dynamicemb")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    small, large = build(world_size, BUCKET), build(world_size, None)
    sizes = [table_statistics(small)["item"].slots]
    for step in range(STEPS):
        outputs = train(small, rank, step), train(large, rank, step)
        assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0]), step
        statistics = table_statistics(small)["item"]
        sizes.append(statistics.slots)
        group, index = local_table(small, "item")
        local_size, local_slots = group.counters()[index].size, group.storage.geometries[index].slots
        assert local_size <= 0.6 * local_slots or not group.storage.geometries[index].can_grow
    assert sizes == sorted(sizes) and sizes[0] == world_size * BUCKET
    assert table_statistics(small)["item"].evicted == table_statistics(large)["item"].evicted == 0
    assert table_statistics(small)["full"].slots == table_statistics(small)["full"].capacity
    assert sizes[-1] == table_statistics(small)["item"].capacity == table_statistics(large)["item"].capacity
    compare(small, large)
    rows_now = evaluated(small, {"item": ALL_IDS, "full": ALL_IDS})["item"]
    assert torch.equal(rows_now, evaluated(large, {"item": ALL_IDS, "full": ALL_IDS})["item"])
    return [record.getMessage() for record in records]


def compare(small: nn.Module, large: nn.Module) -> None:
    """Same keys with the same scores, rows and states; only slots inside a bucket depend on the history."""
    stored = [group.stored_rows(index) for group, index in (local_table(model, "item") for model in (small, large))]
    assert stored[0].keys.numel() > 300
    assert torch.equal(stored[0].keys, stored[1].keys), "no key is lost"
    assert torch.equal(stored[0].scores, stored[1].scores)
    assert torch.equal(stored[0].embeddings, stored[1].embeddings)
    assert torch.equal(stored[0].states["sum"], stored[1].states["sum"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_growing_table_equals_full_table(world_size: int) -> None:
    for messages in run_on_ranks(world_size, grow):
        assert len(messages) >= 3, "every doubling is announced"
        for message in messages:
            assert "table 'item' grew from" in message and "slots" in message
        assert "full" not in "".join(messages)


def memory(rank: int, world_size: int) -> None:
    """17 bytes of metadata for each slot, and rows; nothing else, however often a table has doubled."""
    model = build(world_size, BUCKET)
    for step in range(STEPS):
        for group in groups(model):
            slots = sum(size.slots for size in group.storage.geometries)
            expected = slots * (17 + group.storage.layout.row_bytes)
            assert group.storage.num_bytes == expected
            assert group.storage.layout.row_bytes == 8 * 4 + 16, "eight columns; one state, aligned to 16 bytes"
        train(model, rank, step)


def test_memory_is_rows_and_17_bytes_a_slot() -> None:
    run_on_ranks(2, memory)
