"""Any 64 bits are an id, whatever integers they arrive in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    NORMAL,
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    one_sample,
    rows,
    table,
    train_step,
)

EXTREMES = [-(2**63), -(2**63) + 1, -(2**31) - 1, -4, -3, -2, -1, 0, 1, 2**31, 2**32, 2**63 - 2, 2**63 - 1]
RANDOM_KEYS = 10**6
SGD = (torch.optim.SGD, {"lr": 1.0})


def random_keys() -> torch.Tensor:
    """int64 [10**6], distinct, and none of the extremes."""
    keys = np.random.default_rng(5).integers(-(2**63), 2**63 - 1, RANDOM_KEYS, dtype=np.int64, endpoint=True)
    assert len(np.unique(keys)) == RANDOM_KEYS and not np.isin(keys, EXTREMES).any()
    return torch.from_numpy(keys)


def store_and_find(rank: int, world_size: int) -> None:
    options = {"max_capacity": RANDOM_KEYS, "initializer_args": NORMAL}
    model = distribute(collection(table("item", 1, 4)), {"item": dynamic(**options)}, SGD)
    keys = torch.cat([torch.tensor(EXTREMES), random_keys()])
    assert not evaluated(model, {"item": keys})["item"].any(), "nothing is there yet"
    with torch.no_grad():
        parts = keys.chunk(world_size)[rank].split(100_000)
        seen = [rows(model, one_sample({"item": part}))["item"] for part in parts]
    statistics = table_statistics(model)["item"]
    assert (statistics.size, statistics.refused, statistics.evicted) == (keys.numel(), 0, 0)
    # Each rank finds what the other one has stored.
    found = evaluated(model, {"item": keys.roll(keys.numel() // 2)})["item"]
    found = found.roll(-(keys.numel() // 2), 0)
    assert torch.equal(found.chunk(world_size)[rank], torch.cat(seen))
    first_columns = found[:, :2].contiguous().view(torch.int64)
    assert first_columns.unique().numel() == keys.numel(), "a row of its own for each key"
    others = torch.tensor([EXTREMES[0] + 2, -5, 2, 2**32 + 1, 2**63 - 3])
    assert not evaluated(model, {"item": others})["item"].any()


def test_extremes_and_a_million_random_keys() -> None:
    run_on_ranks(2, store_and_find)


def as_uint64(keys: list[int]) -> torch.Tensor:
    return torch.tensor(keys).view(torch.uint64)


def build(with_static: bool = False) -> nn.Module:
    """Ids come in another order than the tables, so that torchrec has to permute them."""
    tables = [table("item", features=["item"]), table("user", features=["user", "friend"])]
    constraints = {name: dynamic(initializer_args=ZEROS, max_capacity=1024) for name in ("item", "user")}
    if with_static:
        tables.append(table("country", 100))
        constraints["country"] = STATIC  # type: ignore[assignment]
    return distribute(collection(*tables), constraints, SGD)


def batch_of(values: torch.Tensor, lengths_by_feature: dict[str, int]) -> KeyedJaggedTensor:
    """One sample."""
    return KeyedJaggedTensor(
        keys=list(lengths_by_feature), values=values, lengths=torch.tensor(list(lengths_by_feature.values()))
    )


def train_with_dtypes(rank: int, world_size: int, with_static: bool) -> None:
    ids = {"friend": [5, -7, 5], "user": [-7, 2**31 - 1], "item": [-(2**31), -1, 0, 5]}
    if with_static:
        ids["country"] = [1, 5, 99]
    values = torch.tensor([value for values in ids.values() for value in values])
    lengths = {name: len(values) for name, values in ids.items()}
    trained = []
    for converted in (values, values.int(), values.view(torch.uint64)):
        model = build(with_static)
        output = train_step(model, batch_of(converted, lengths))
        train_step(model, batch_of(converted, lengths))
        after = evaluated(model, {name: torch.tensor(values) for name, values in ids.items()})
        assert table_statistics(model)["user"].size == 3
        trained.append({name: (output[name], after[name]) for name in ("friend", "user", "item")})
    for other in trained[1:]:
        for name, expected in trained[0].items():
            assert all(torch.equal(*pair) for pair in zip(expected, other[name])), name
    assert (trained[0]["user"][1] == torch.tensor([[-4.0], [-2.0]])).all(), "key -7 comes twice in a batch"


@pytest.mark.parametrize("with_static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_int32_int64_and_uint64_ids_are_the_same_keys(world_size: int, with_static: bool) -> None:
    run_on_ranks(world_size, train_with_dtypes, with_static)


def train_uint64(rank: int, world_size: int) -> None:
    model = build()
    values = torch.from_numpy(np.array([2**63, 2**64 - 1, 2**64 - 2], dtype=np.uint64))
    train_step(model, batch_of(values, {"friend": 0, "user": 0, "item": 3}))
    empty = torch.empty(0, dtype=torch.int64)
    asked = {"friend": empty, "user": empty, "item": torch.tensor([-(2**63), -1, -2, 0])}
    assert evaluated(model, asked)["item"][:, 0].tolist() == [-1.0, -1.0, -1.0, 0.0]


def test_uint64_above_the_signed_range() -> None:
    run_on_ranks(2, train_uint64)


def train_without_ids(rank: int, world_size: int, with_static: bool) -> None:
    """``torch.tensor([])`` is of floats, but there is no id in it that could be wrong."""
    model = build(with_static)
    names = ["friend", "user", "item"] + ["country"] * with_static
    for samples in (0, 3):
        features = features_of({name: [[1], [], [2]] for name in names})
        if rank == 0:
            lengths = torch.zeros(samples * len(names), dtype=torch.int64)
            features = KeyedJaggedTensor(keys=names, values=torch.tensor([]), lengths=lengths)
        output = rows(model, features)
        assert all(values.shape == (0 if rank == 0 else 2, 8) for values in output.values())
        torch.stack([values.sum() for values in output.values()]).sum().backward()
    assert table_statistics(model)["item"].size == 2 * (world_size > 1)


@pytest.mark.parametrize("with_static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_ids_of_no_particular_dtype(world_size: int, with_static: bool) -> None:
    run_on_ranks(world_size, train_without_ids, with_static)


def index_type_is_checked_nowhere_but_the_ids(rank: int, world_size: int) -> None:
    """``index_type`` says what the user means to feed; every integer of 32 or 64 bits is taken whatever it says."""
    options = {"index_type": torch.int32, "evict_strategy": DynamicEmbEvictStrategy.LFU, "initializer_args": ZEROS}
    model = distribute(collection(table("item")), {"item": dynamic(**options)}, SGD)
    train_step(model, features_of({"item": [[-(2**63), 3]]}))
    assert table_statistics(model)["item"].size == 2


def test_index_type() -> None:
    run_on_ranks(1, index_type_is_checked_nowhere_but_the_ids)
