"""Tables at their capacity, step by step against dictionaries: who is evicted, who is refused, what everyone reads."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.shard import get_score, set_score, table_statistics
from tests.distributed import run_on_ranks
from tests.oracle import mix64, signed
from tests.shard.models import collection, distribute, dynamic, evaluated, features_of, local_table, rows, table
from tests.shard.replay import Replay

LRU, LFU, CUSTOMIZED = (
    DynamicEmbEvictStrategy.LRU, DynamicEmbEvictStrategy.LFU, DynamicEmbEvictStrategy.CUSTOMIZED
)  # fmt: skip
STEPS = 40
BUCKET = 8
DEBUG = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.DEBUG)
#: Strategy, rows on each rank at most and at first, load factor for growth. The two first ones form one group.
TABLES: dict[str, tuple[DynamicEmbEvictStrategy, int, int, float]] = {
    "recent": (LRU, 72, 72, 0.5),
    "growing": (LRU, 100, 8, 0.75),
    "frequent": (LFU, 64, 64, 0.5),
    "given": (CUSTOMIZED, 64, 16, 1.0),
}
FEATURES = {"recent": ["recent_a", "recent_b"], "growing": ["growing"], "frequent": ["frequent"], "given": ["given"]}


def build(world_size: int) -> tuple[nn.Module, dict[str, Replay]]:
    configs = [table(name, 10**6, 4, FEATURES[name]) for name in TABLES]
    constraints, replays = {}, {}
    for name, (strategy, max_rows, init_rows, load_factor) in TABLES.items():
        constraints[name] = dynamic(
            evict_strategy=strategy, max_capacity=max_rows, init_capacity=init_rows, max_load_factor=load_factor,
            bucket_capacity=BUCKET, initializer_args=DEBUG,
        )  # fmt: skip
        index = 1 if name == "growing" else 0
        replays[name] = Replay(world_size, index, strategy, BUCKET, max_rows, init_rows, load_factor)
    return distribute(collection(*configs), constraints, (torch.optim.SGD, {"lr": 1.0})), replays


def id_of(number: int) -> int:
    """Any 64 bits."""
    return signed(mix64(number))


def make_ids(generator: random.Random, world_size: int) -> list[int]:
    """A skewed batch, empty in one of six cases; now and then so large that buckets cannot hold it."""
    size = generator.choice([0, 5, 20, 40, 60, 150])
    return [id_of(int(generator.random() ** 2 * 150 * world_size)) for _ in range(size)]


def check_output(expected: dict[str, list[float]], output: dict[str, torch.Tensor], step: int) -> None:
    for feature, values in expected.items():
        columns = torch.tensor(values).view(-1, 1).expand(-1, 4)
        assert torch.equal(columns, output[feature]), f"step {step}, feature {feature}"


def check_state(model: nn.Module, replays: dict[str, Replay], rank: int, step: int) -> None:
    statistics = table_statistics(model)
    for name, replay in replays.items():
        seen = statistics[name]
        expected = (replay.size, replay.slots, replay.hits, replay.misses, replay.evicted, replay.refused)
        actual = (seen.size, seen.slots, seen.hits, seen.misses, seen.evicted, seen.refused)
        assert actual == expected, f"step {step}, table {name}: {actual} instead of {expected}"
        assert seen.size <= seen.capacity
        group, index = local_table(model, name)
        stored = group.stored_rows(index)
        entries = zip(stored.slots.tolist(), stored.keys.tolist(), stored.scores.tolist(), strict=True)
        model_entries = {slot: (key, score) for slot, (_, key, score) in replay.tables[rank].occupied().items()}
        assert {slot: (key, score) for slot, key, score in entries} == model_entries, f"step {step}, table {name}"


def train_beside_replay(rank: int, world_size: int) -> dict[str, Any]:
    model, replays = build(world_size)
    generator = random.Random(world_size)
    features = [feature for names in FEATURES.values() for feature in names]
    for step in range(STEPS):
        score = generator.randrange(-(2**63), 2**63)
        set_score(model, score if step % 2 else {"given": score})
        replays["given"].custom_score = score
        batches = [{feature: make_ids(generator, world_size) for feature in features} for _ in range(world_size)]
        expected: dict[str, list[float]] = {}
        for name, replay in replays.items():
            outputs = replay.train([[key for feature in FEATURES[name] for key in batch[feature]] for batch in batches])
            split = len(batches[rank][FEATURES[name][0]])
            expected.update(zip(FEATURES[name], [outputs[rank][:split], outputs[rank][split:]]))
        output = rows(model, features_of({feature: [ids] for feature, ids in batches[rank].items()}))
        check_output(expected, output, step)
        (torch.stack([values.sum() for values in output.values()]).sum() * -world_size).backward()
        assert get_score(model) == {"recent": step + 1, "growing": step + 1, "given": score}
        check_state(model, replays, rank, step)
        # Evaluation of ids that are there and others; the next check would see what it changed.
        asked = {feature: [id_of(generator.randrange(200 * world_size)) for _ in range(30)] for feature in features}
        read = {feature: replays[name].read(asked[feature]) for name in TABLES for feature in FEATURES[name]}
        check_output(read, evaluated(model, {name: torch.tensor(ids) for name, ids in asked.items()}), step)
    check_state(model, replays, rank, STEPS)
    return {name: vars(statistics) for name, statistics in table_statistics(model).items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_against_dictionaries(world_size: int) -> None:
    results = run_on_ranks(world_size, train_beside_replay)
    assert results == results[:1] * world_size
    for name, statistics in results[0].items():
        assert statistics["evicted"] > 100, name
        assert statistics["refused"] > 10, name
        assert statistics["slots"] == statistics["capacity"]
