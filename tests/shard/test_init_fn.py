"""``init_fn`` of a dynamic table's config is not called, wherever torchrec initialises a collection; others' are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchrec import EmbeddingCollection

from dynamicemb import DynamicEmbWarning
from dynamicemb.shard import ShardedDynamicEmbeddingCollection, table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import CPU, STATIC, distribute, dynamic, features_of, table, train_step


def first_row_is_zero(calls: list[torch.Size]) -> Callable[[torch.Tensor], None]:
    def init_fn(weight: torch.Tensor) -> None:
        calls.append(weight.shape)
        with torch.no_grad():
            weight[0].zero_()  # an empty parameter has no row 0

    return init_fn


def work(rank: int, world_size: int) -> None:
    for device in (torch.device("meta"), CPU):
        dynamic_calls: list[torch.Size] = []
        static_calls: list[torch.Size] = []
        tables = [table("item"), table("city", num_embeddings=40)]
        tables[0].init_fn, tables[1].init_fn = first_row_is_zero(dynamic_calls), first_row_is_zero(static_calls)
        module = EmbeddingCollection(tables=tables, device=device)
        of_torchrec = len(dynamic_calls)  # the module's own table, which torchrec initialises when it is made
        assert of_torchrec == 1 and dynamic_calls[0] == (1000, 8)
        with pytest.warns(DynamicEmbWarning, match="init_fn of its config has no effect"):
            model = distribute(module, {"item": dynamic(), "city": STATIC})
        train_step(model, features_of({"item": [[1, 2]], "city": [[3]]}))
        (sharded,) = [part for part in model.modules() if isinstance(part, ShardedDynamicEmbeddingCollection)]
        calls = len(static_calls)
        sharded.reset_parameters()
        assert len(dynamic_calls) == of_torchrec and len(static_calls) == calls + 1
        assert table_statistics(model)["item"].size == 0


def test_it_is_not_called() -> None:
    run_on_ranks(1, work)
