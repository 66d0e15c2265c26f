"""Statistics of many tables: what they say of each, and what asking costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import get_score, set_score, table_statistics
from tests.distributed import run_on_ranks
from tests.shard.models import ZEROS, collection, distribute, dynamic, features_of, groups, table, train_step

CUSTOMIZED = DynamicEmbEvictStrategy.CUSTOMIZED
#: Each table may grow from one bucket to four.
GROWING = {"initializer_args": ZEROS, "init_capacity": 8, "max_capacity": 32, "bucket_capacity": 8}


def costs_of_asking(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """26 tables in two groups. The numbers are those that each group tells of each of its tables, added up."""
    names = [f"t{index}" for index in range(26)]
    options = {
        name: dynamic(**GROWING, **({"evict_strategy": CUSTOMIZED} if index % 3 else {}))
        for index, name in enumerate(names)
    }
    model = distribute(collection(*map(table, names)), options, (torch.optim.SGD, {"lr": 1.0}))
    for step in range(3):
        train_step(model, features_of({name: [range(index + step + rank)] for index, name in enumerate(names)}))
    collectives: list[torch.Size] = []
    reads: list[torch.Size] = []
    to_list, all_reduce = torch.Tensor.tolist, dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: [reads.append(tensor.shape), to_list(tensor)][1])
        patch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a number is asked for"))
        patch.setattr(
            dist, "all_reduce", lambda tensor, **how: [collectives.append(tensor.shape), all_reduce(tensor, **how)][1]
        )
        statistics = table_statistics(model)
    assert len(reads) == 1 and len(collectives) == (world_size > 1)
    assert sorted(statistics) == sorted(names)
    own = {}
    for group in groups(model):
        for config, counters, size in zip(group.configs, group.counters(), group.storage.geometries, strict=True):
            own[config.name] = {**vars(counters), "slots": size.slots, "capacity": size.max_slots}
    everywhere: list[Any] = [None] * world_size
    dist.all_gather_object(everywhere, own)
    for name, entry in statistics.items():
        found = vars(entry)
        assert found.pop("load_factor") == entry.size / entry.capacity
        assert found == {field: sum(rank_own[name][field] for rank_own in everywhere) for field in found}, name
    return {name: vars(entry) for name, entry in statistics.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_exchange_and_one_wait_for_all_tables(world_size: int) -> None:
    results = run_on_ranks(world_size, costs_of_asking)
    assert all(result == results[0] for result in results)
    assert results[0]["t0"]["size"] == 1 + world_size and results[0]["t0"]["slots"] == 8 * world_size
    assert results[0]["t25"]["slots"] == 32 * world_size


class TwoTowers(nn.Module):
    """Both towers have a table called ``item``, one of them also a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = collection(table("item"))
        self.answer = collection(table("item"), table("user"))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Any]:
        query, answer = self.query(features), self.answer(features).wait()
        return {"query": query.wait()["item"], "answer": answer["item"], "user": answer["user"]}


def duplicate_names(rank: int, world_size: int) -> None:
    options = dict.fromkeys(("item", "user"), dynamic(initializer_args=ZEROS, evict_strategy=CUSTOMIZED))
    model = distribute(TwoTowers(), options, (torch.optim.SGD, {"lr": 1.0}))
    train_step(model, features_of({"item": [[1, 2]], "user": [[3]]}))
    expected = {"model.query.item": 2, "model.answer.item": 2, "user": 1}
    assert {name: entry.size for name, entry in table_statistics(model).items()} == expected
    set_score(model, {"model.answer.item": 6, "user": -1})
    assert get_score(model) == {"model.query.item": 0, "model.answer.item": 6, "user": -1}


def test_a_name_of_two_collections_has_the_path_of_its_collection() -> None:
    run_on_ranks(1, duplicate_names)
