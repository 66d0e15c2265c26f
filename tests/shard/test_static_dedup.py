"""Index deduplication of torchrec's own tables on the CPU: alone, and in a model with every kind of sharding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from dynamicemb.shard.static_dedup import dedup_replicated, dedup_static
from tests.distributed import run_on_ranks
from tests.shard.models import collection, distribute, dynamic, evaluated, features_of, rows, table

DEBUG = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.DEBUG)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_by_hand(dtype: torch.dtype) -> None:
    """Two tables, the first with two features; equal ids of different tables are different."""
    batch = {"a": [[5, 7], [5]], "b": [[], [7, 9, 5]], "c": [[5], [5]]}
    features = features_of(batch, dtype)
    unique, inverse = dedup_static(features, [2, 1])
    assert unique.keys() == features.keys() and unique.stride() == 2
    assert unique.values().dtype is dtype
    assert unique.lengths().view(3, 2).tolist() == [[3, 0], [0, 0], [1, 0]]
    first, second = unique.values()[:3], unique.values()[3:]
    assert sorted(first.tolist()) == [5, 7, 9] and second.tolist() == [5]
    assert torch.equal(unique.values()[inverse], features.values())
    assert inverse[-2:].tolist() == [3, 3]


def test_without_ids() -> None:
    features = features_of({"a": [[], []], "b": [[], []]})
    unique, inverse = dedup_static(features, [1, 1])
    assert unique.lengths().tolist() == [0, 0, 0, 0] and inverse.numel() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("groups", [[3], [1, 1, 1], [2, 1], [1, 2]])
def test_replicated_by_hand(dtype: torch.dtype, groups: list[int]) -> None:
    """One id a sample, each table's in its first feature; the rest is filled up with the id 0."""
    batch = {"a": [[5, 7], [5]], "b": [[], [7, 9, 5]], "c": [[6], [6]], "d": [[8], [3]]}
    features_by_table = [2, 1, 1]
    features = features_of(batch, dtype)
    unique, places = dedup_replicated(features, features_by_table, groups)
    assert unique.keys() == features.keys() and unique.stride() == 3
    assert unique.values().dtype is dtype and unique.lengths().tolist() == [1] * 12
    values = unique.values().view(4, 3)
    assert [sorted(ids) for ids in values.tolist()] == [[5, 7, 9], [0, 0, 0], [0, 0, 6], [0, 3, 8]]
    # The operator returns the rows of a sample next to each other, group by group.
    tables = torch.tensor(features_by_table).split(groups)
    by_group = values.split([int(group.sum()) for group in tables])
    assert torch.equal(torch.cat([part.T.flatten() for part in by_group])[places], features.values())
    empty, places = dedup_replicated(features_of({"a": [[], []]}), [1], [1])
    assert empty.lengths().tolist() == [0, 0] and places.numel() == 0


STATIC_TABLES = {"wide": "row_wise", "city": "row_wise", "whole": "table_wise", "other": "table_wise"}


def build(use_index_dedup: bool) -> nn.Module:
    """Static and dynamic tables of two features each; a row is its id in every column."""
    tables = [table(name, 64, 4, [f"{name}_1", f"{name}_2"]) for name in (*STATIC_TABLES, "item")]
    constraints = {name: ParameterConstraints(sharding_types=[kind]) for name, kind in STATIC_TABLES.items()}
    constraints["item"] = dynamic(initializer_args=DEBUG)
    sharder = DynamicEmbeddingCollectionSharder(use_index_dedup=use_index_dedup)
    model = distribute(collection(*tables), constraints, (torch.optim.SGD, {"lr": 1.0}), sharder)
    state = model.state_dict()
    for name in STATIC_TABLES:
        for shard in state[f"embeddings.{name}.weight"].local_shards():
            first = shard.metadata.shard_offsets[0]
            shard.tensor.copy_(torch.arange(first, first + shard.tensor.shape[0]).view(-1, 1))
    return model


def make_batch(rank: int, step: int) -> KeyedJaggedTensor:
    """A feature of each table is empty in one step, and every other batch of rank 1."""
    generator = torch.Generator().manual_seed(10 * rank + step)
    batch = {}
    for name in (*STATIC_TABLES, "item"):
        for place in (1, 2):
            samples = torch.randint(0, 20, (3, 4), generator=generator).tolist()
            empty = (place == 2 and step == 1) or (rank == 1 and step == 2)
            batch[f"{name}_{place}"] = [[], [], []] if empty else [samples[0], [], samples[1] + samples[2]]
    return features_of(batch)


def train(rank: int, world_size: int) -> None:
    models = [build(use_index_dedup) for use_index_dedup in (False, True)]
    for step in range(4):
        batch = make_batch(rank, step)
        outputs = [rows(model, batch) for model in models]
        for output in outputs:
            # Times the number of ranks that gradients are divided by: all sums are of whole numbers, and exact.
            (torch.stack([values.sum() for values in output.values()]).sum() * world_size).backward()
        for feature, jagged in batch.to_dict().items():
            assert torch.equal(*(output[feature] for output in outputs)), f"step {step}, {feature}"
            if step == 0:
                assert torch.equal(outputs[0][feature], jagged.values().view(-1, 1).expand(-1, 4).float()), feature
    ids = dict.fromkeys(batch.keys(), torch.arange(20))
    trained = [evaluated(model, ids) for model in models]
    for feature, values in trained[0].items():
        assert torch.equal(values, trained[1][feature])
        assert (values != torch.arange(20).view(-1, 1)).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_and_training_are_the_same_with_and_without(world_size: int) -> None:
    run_on_ranks(world_size, train)


REPLICATED = ("small", "tiny")


def build_replicated(
    use_index_dedup: bool, with_others: bool, names: Sequence[str] = REPLICATED, num_features: int = 2
) -> nn.Module:
    """Data-parallel tables of two dtypes, alone or beside a row-wise and a dynamic one."""
    tables = [table(name, 64, 4, [f"{name}_{place + 1}" for place in range(num_features)]) for name in names]
    tables[-1].data_type = DataType.FP16 if len(names) > 1 else DataType.FP32
    constraints = {name: ParameterConstraints(sharding_types=["data_parallel"]) for name in names}
    if with_others:
        tables += [table("city", 64, 4), table("item", 64, 4)]
        constraints |= {"city": ParameterConstraints(sharding_types=["row_wise"]), "item": dynamic()}
    sharder = DynamicEmbeddingCollectionSharder(use_index_dedup=use_index_dedup)
    model = distribute(collection(*tables), constraints, None, sharder)
    state = model.state_dict()
    for name in names:
        state[f"embeddings.{name}.weight"].copy_(torch.arange(64).view(-1, 1))
    return model


def train_replicated(rank: int, world_size: int, use_index_dedup: bool, with_others: bool) -> None:
    """Every row is its id, and the gradient of a row the number of times that its id occurs, divided by the ranks."""
    model = build_replicated(use_index_dedup, with_others)
    others = {"city": [[1], [], [2]], "item": [[-5], [5], []]} if with_others else {}
    occurrences = {name: torch.zeros(64) for name in REPLICATED}
    batches = []
    for sender in range(world_size):
        generator = torch.Generator().manual_seed(sender)
        batch = {
            f"{name}_{place}": [torch.randint(0, 20, (count,), generator=generator).tolist() for count in (2, 0, 4)]
            for name in REPLICATED
            for place in (1, 2)
        }
        batch["tiny_2"] = [[], [], []]
        for feature, samples in batch.items():
            ids = torch.tensor([value for ids in samples for value in ids], dtype=torch.int64)
            occurrences[feature.split("_")[0]] += torch.bincount(ids, minlength=64)
        batches.append(features_of({**batch, **others}))
    output = rows(model, batches[rank])
    for feature, jagged in batches[rank].to_dict().items():
        if feature not in others:
            assert torch.equal(output[feature], jagged.values().view(-1, 1).expand(-1, 4).float()), feature
    torch.stack([values.sum() for values in output.values()]).sum().backward()
    parameters = dict(model.named_parameters())
    for name in REPLICATED:
        gradient = parameters[f"embeddings.{name}.weight"].grad
        torch.testing.assert_close(gradient.float(), (occurrences[name] / world_size).view(-1, 1).expand(-1, 4))


def without_ids(rank: int, world_size: int) -> None:
    model = build_replicated(True, False, REPLICATED[:1], 1)
    assert rows(model, features_of({"small_1": [[], []]}))["small_1"].shape == (0, 4)


def work_replicated(rank: int, world_size: int) -> None:
    for use_index_dedup, with_others in itertools.product((False, True), repeat=2):
        train_replicated(rank, world_size, use_index_dedup, with_others)
    without_ids(rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_data_parallel_tables(world_size: int) -> None:
    run_on_ranks(world_size, work_replicated)
