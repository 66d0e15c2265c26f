"""Bad input is one clear error on every rank, and nobody waits for a rank that has given up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.optim import LAMB
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import ConfigError, KeyTypeError
from dynamicemb.errors import RemoteRankError
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, table_statistics
from dynamicemb.table.storage import Chunk
from tests.distributed import run_on_ranks
from tests.shard.models import STATIC, ZEROS, collection, distribute, dynamic, features_of, rows, table, train_step

BAD_RANK = 1


class TwoCollections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = collection(table("item"), table("country"))
        self.second = collection(table("user", dim=4))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Any]:
        first, second = self.first(features), self.second(features)
        return {**first.wait(), **second.wait()}


def build(which: str) -> nn.Module:
    options = dynamic(initializer_args=ZEROS, max_capacity=512)
    constraints = {"item": options, "country": STATIC if which == "with static" else options}
    optimizer = (torch.optim.SGD, {"lr": 1.0})
    if which == "two collections":
        return distribute(TwoCollections(), {**constraints, "user": options}, optimizer)
    sharder = DynamicEmbeddingCollectionSharder(use_index_dedup=which == "with static")
    return distribute(collection(table("item"), table("country")), constraints, optimizer, sharder)


def feed_floats(rank: int, world_size: int, which: str, dtype: torch.dtype) -> tuple[str, str]:
    model = build(which)
    ids = {"country": [[1, 2]], "item": [[3, 4]], **({"user": [[5]]} if which == "two collections" else {})}
    train_step(model, features_of(ids))
    before = table_statistics(model)
    bad = world_size == 1 or rank == BAD_RANK
    with pytest.raises((KeyTypeError, RemoteRankError)) as caught:
        rows(model, features_of({**ids, "item": [[6, 7]]}, dtype if bad else torch.int64))
    assert table_statistics(model) == before, "the tables are unchanged"
    train_step(model, features_of({**ids, "item": [[3, 8]]}))
    assert table_statistics(model)["item"].size == 3, "the next batch is served"
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize("which", ["dynamic", "with static", "two collections"])
@pytest.mark.parametrize(("world_size", "dtype"), [(1, torch.float32), (3, torch.float32), (2, torch.float64)])
def test_float_ids(world_size: int, dtype: torch.dtype, which: str) -> None:
    results = run_on_ranks(world_size, feed_floats, which, dtype)
    bad = BAD_RANK if world_size > 1 else 0
    for rank, (name, message) in enumerate(results):
        if rank == bad:
            assert name == "KeyTypeError"
            assert str(dtype) in message and "item" in message and "int64" in message
        else:
            assert name == "RemoteRankError"
            assert f"rank {BAD_RANK}" in message


def unknown_optimizers(rank: int, world_size: int) -> list[str]:
    """None of these may allocate a slot, not even for the table whose optimizer is fine."""

    def refuse(*args: Any) -> None:
        raise AssertionError("allocated")

    Chunk.allocate = refuse  # type: ignore[assignment, method-assign]
    constraints = {"item": dynamic(), "country": dynamic()}
    tables = collection(table("item"), table("country"))
    messages = []
    for optimizer, fused_params in (
        ((torch.optim.RMSprop, {"lr": 0.1}), None),
        ((LAMB, {"lr": 0.1}), None),
        (None, {"optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM}),
        (None, {"optimizer": EmbOptimType.ADAM, "learning_rate": -1.0}),
        (None, {"optimizer": EmbOptimType.EXACT_ADAGRAD, "max_gradient": 1.0}),
    ):
        sharder = DynamicEmbeddingCollectionSharder(fused_params=fused_params)
        with pytest.raises(ConfigError) as caught:
            distribute(tables if optimizer is None else collection(table("item"), table("country")), constraints,
                       optimizer, sharder)  # fmt: skip
        messages.append(str(caught.value))
    return messages


def test_unknown_optimizer() -> None:
    first, second = run_on_ranks(2, unknown_optimizers)
    assert first == second
    rms_prop, lamb, rowwise_adam, negative, max_gradient = first
    for message in (rms_prop, lamb, rowwise_adam):
        assert "table 'item'" in message and "use SGD, Adagrad, RowWiseAdagrad or Adam" in message
    assert "RMSprop" in rms_prop
    assert "learning_rate=-1.0" in negative
    assert "max_gradient" in max_gradient


class OtherSharder(DynamicEmbeddingCollectionSharder):
    """Plans with one optimizer and shards with another one."""

    def shard(self, *args: Any, **kwargs: Any) -> Any:
        def refuse(*_: Any) -> None:
            raise AssertionError("allocated")

        Chunk.allocate = refuse  # type: ignore[assignment, method-assign]
        self._fused_params = {"optimizer": EmbOptimType.LAMB}
        return super().shard(*args, **kwargs)


def shard_unknown_optimizer(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match="is not supported for dynamic tables"):
        distribute(collection(table("item")), {"item": dynamic()}, sharder=OtherSharder())


def test_unknown_optimizer_of_the_sharder_alone() -> None:
    run_on_ranks(1, shard_unknown_optimizer)
