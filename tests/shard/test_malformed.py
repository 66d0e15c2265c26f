"""Batches that contradict themselves: one error that says how, on every rank, and the next batch is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.errors import DataError, RemoteRankError
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import (
    STATIC,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    table,
    train_step,
)

KEYS = ["item", "country"]
BAD_RANK = 1


def kjt(values: Any, lengths: Any = None, keys: list[str] = KEYS, **fields: Any) -> KeyedJaggedTensor:
    tensors = {
        name: torch.tensor(field) if isinstance(field, list) else field
        for name, field in {"values": values, "lengths": lengths}.items()
    }
    return KeyedJaggedTensor(keys=keys, **tensors, **fields)


def variable_stride(lengths: list[int], ids: int) -> KeyedJaggedTensor:
    """Two samples of items, one of countries."""
    inverse_indices = (KEYS, torch.tensor([[0, 1], [0, 0]]))
    return kjt(
        list(range(ids)), lengths, stride_per_key_per_rank=[[2], [1]], inverse_indices=inverse_indices
    )  # fmt: skip


#: Batch of the bad rank, and what the message says.
CASES: dict[str, tuple[Callable[[], KeyedJaggedTensor], str]] = {
    "too few ids": (lambda: kjt([1, 2], [1, 0, 2, 0]), "add up to 3, but it has 2 ids.* item 1, country 2$"),
    "too many ids": (lambda: kjt([1, 2, 3, 4], [1, 0, 2, 0]), "add up to 3, but it has 4 ids.* item 1, country 2$"),
    "ids without lengths": (lambda: kjt([1, 2], [0, 0]), "add up to 0, but it has 2 ids"),
    "lengths without ids": (lambda: kjt(torch.empty(0, dtype=torch.int64), [4, 0]), "add up to 4, but it has 0 ids"),
    "ids without samples": (lambda: kjt([1], torch.empty(0, dtype=torch.int64)), "add up to 0, but it has 1 ids"),
    "int32 lengths": (lambda: kjt([1, 2], torch.tensor([1, 2], dtype=torch.int32)), "add up to 3, but it has 2 ids"),
    "lengths beyond int32": (lambda: kjt([1], torch.full((2,), 2**31 - 1, dtype=torch.int32)), "add up to 4294967294"),
    "offsets": (lambda: kjt([1, 2], offsets=torch.tensor([0, 1, 3])), "add up to 3, but it has 2 ids"),
    "falling offsets": (lambda: kjt([1, 2], offsets=torch.tensor([0, 3, 2])), "features country have negative lengths"),
    "int32 ids": (lambda: kjt(torch.tensor([1], dtype=torch.int32), [1, 1]), "add up to 2, but it has 1 ids"),
    "weights": (
        lambda: kjt([1, 2], [1, 2], weights=torch.ones(2)), "add up to 3, but it has 2 ids"
    ),
    "too few weights": (lambda: kjt([1, 2], [1, 1], weights=torch.ones(1)), "1 weights for 2 ids"),
    "negative": (lambda: kjt([1, 2], [-1, 2, 1, 0]), "features item have negative lengths.* item 1, country 1$"),
    "negative sums": (lambda: kjt([1, 2], [3, -1]), "features country have negative lengths.* item 3, country -1$"),
    "variable stride, too few ids": (lambda: variable_stride([1, 2, 1], 3), "add up to 4, but it has 3 ids"),
    "variable stride, negative": (lambda: variable_stride([1, 2, -1], 2), "features country have negative lengths"),
    "two dimensions": (lambda: kjt([[1], [2]], [1, 1]), r"ids have the shape \(2, 1\)"),
    "lengths of two dimensions": (lambda: kjt([1, 2], [[1], [1]]), r"lengths have the shape \(2, 1\)"),
    "a length too many": (lambda: kjt([1, 2], [1, 1, 0]), r"3 lengths for 2 features \(item, country\)"),
    "another stride": (lambda: kjt([1, 2], [1, 1], stride=2), "2 lengths for 2 features.* 4 samples"),
    "short lengths": (lambda: kjt([1, 2], torch.tensor([1, 1], dtype=torch.int16)), "lengths are torch.int16"),
    "a feature is missing": (lambda: kjt([1, 2], [2], ["item"]), "lacks the features country; it has item"),
    "other features": (lambda: kjt([1, 2], [1, 1], ["user", "city"]), "lacks .* country, item; it has user, city"),
    "a feature comes twice": (
        lambda: kjt([1, 2, 3], [1, 1, 1], ["item", "country", "item"]), "has the features item more than once"
    ),
    "on another device": (
        lambda: kjt(torch.ones(2, dtype=torch.int64, device="meta"), torch.ones(2, dtype=torch.int64, device="meta")),
        "ids are on meta, but the tables are on cpu",
    ),
}  # fmt: skip


def build(with_static: bool, optimizer: Any = (torch.optim.SGD, {"lr": 1.0})) -> nn.Module:
    options = dynamic(initializer_args=ZEROS, max_capacity=512)
    constraints = {"item": options, "country": STATIC if with_static else options}
    sharder = DynamicEmbeddingCollectionSharder(use_index_dedup=with_static)
    return distribute(collection(*map(table, KEYS)), constraints, optimizer, sharder)


def forward(model: nn.Module, batch: KeyedJaggedTensor) -> None:
    for jagged in model(batch).values():
        jagged.values()


def good(*items: int) -> KeyedJaggedTensor:
    return features_of({"item": [items], "country": [[1]]})


def beside(odd: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A good batch of the same kind: torchrec's static tables need the same tensors and dtypes on all ranks."""
    weights = None if odd.weights_or_none() is None else torch.ones(2)
    lengths = torch.ones(2, dtype=torch.int32 if odd.lengths().dtype is torch.int32 else torch.int64)
    return kjt(torch.tensor([7, 1], dtype=odd.values().dtype), lengths, weights=weights)


def feed(rank: int, world_size: int, with_static: bool) -> None:
    bad = world_size == 1 or rank == BAD_RANK
    model = build(with_static)
    for number, (name, (make, message)) in enumerate(CASES.items()):
        if number % 8 == 0:
            model = build(with_static)  # whose first batch is malformed
        before = table_statistics(model)
        expected = (DataError, message) if bad else (RemoteRankError, f"rank {BAD_RANK} .* a malformed batch")
        with pytest.raises(expected[0], match=expected[1]):
            forward(model, make() if bad else beside(make()))
        assert table_statistics(model) == before, f"{name}: the tables are unchanged"
        train_step(model, good(number, number))
        found = evaluated(model, {"item": torch.tensor([number]), "country": torch.tensor([1])})
        assert found["item"][0, 0] == -2.0, f"{name}: the next batch is served"


@pytest.mark.parametrize("with_static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_one_error_on_all_ranks(world_size: int, with_static: bool) -> None:
    run_on_ranks(world_size, feed, with_static)


def legal(rank: int, world_size: int, with_static: bool) -> None:
    """Batches that look odd and are whole: on rank 0 an ordinary one, so that ranks differ."""
    model = build(with_static)
    none = torch.empty(0, dtype=torch.int64)
    for batch in (
        kjt(none, [0, 0], weights=torch.empty(0)),
        kjt(none, none),
        kjt(none, [0, 0]),
        kjt(none, [0, 0, 0, 0, 0, 0]),
        kjt([5], [0, 0, 0, 1]),
        kjt([5], offsets=torch.tensor([0, 0, 1])),
        kjt([5], torch.tensor([1, 0], dtype=torch.int32)),
        kjt([8, 5, 9], [1, 1, 1], ["other", "country", "item"]),
        variable_stride([0, 1, 1], 2),
    ):
        forward(model, batch if rank == world_size - 1 else beside(batch))


@pytest.mark.parametrize("with_static", [False, True])
def test_odd_batches_are_served(with_static: bool) -> None:
    run_on_ranks(2, legal, with_static)


def another_order(rank: int, world_size: int, with_static: bool) -> None:
    """torchrec takes features by their place in the first batch; here they are taken by name."""
    model = build(with_static)
    for keys in (KEYS, KEYS[::-1], ["other", *KEYS], KEYS):
        samples = {"item": [[11], [12, 13]], "country": [[], [21]], "other": [[31, 32], []]}
        train_step(model, features_of({name: samples[name] for name in keys}))
    values = evaluated(model, {"country": torch.tensor([21, 11]), "item": torch.tensor([11, 12, 13, 21])})
    trained = {name: found[:, 0].tolist() for name, found in values.items()}
    assert trained["item"] == [-4.0, -4.0, -4.0, 0.0]
    if not with_static:  # whose rows start anywhere
        assert trained["country"] == [-4.0, 0.0]


@pytest.mark.parametrize("with_static", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_features_in_another_order(world_size: int, with_static: bool) -> None:
    run_on_ranks(world_size, another_order, with_static)
