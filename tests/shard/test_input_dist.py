"""How many keys of each table go to each rank: by a search in their order, also where that order has unused places."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.shard.input_dist import _Runs
from tests import oracle
from tests.shard.models import CPU


def batch_of(keys: int, tables: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys over the whole range of int64, each of them twice, of some of the tables."""
    generator = torch.Generator().manual_seed(keys)
    drawn = torch.randint(-(2**63), 2**63 - 1, (keys // 2,), generator=generator).repeat(2)
    numbers = torch.tensor(tables, dtype=torch.int32)
    return drawn, numbers[torch.randint(0, len(tables), (keys // 2,), generator=generator)].repeat(2)


def with_unused_places(unique: UniqueKeys) -> UniqueKeys:
    """As long as the batch, which the Triton engine returns: past the count, keys are whatever was in memory."""
    batch, entries = unique.order.numel(), unique.keys.numel()
    generator = torch.Generator().manual_seed(1)
    garbage = torch.randint(-(2**63), 2**63 - 1, (batch - entries,), generator=generator)
    return dataclasses.replace(
        unique,
        keys=torch.cat([unique.keys, garbage]),
        tables=torch.cat([unique.tables, torch.zeros(batch - entries, dtype=torch.int32)]),
        offsets=torch.cat([unique.offsets, torch.full((batch - entries,), batch)]),
    )


@pytest.mark.parametrize("unused_places", [False, True])
@pytest.mark.parametrize("keys", [0, 2, 40, 2000])
@pytest.mark.parametrize("tables", [[0], [0, 1, 2], [1, 3], [4]])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_keys_of_each_run(world_size: int, tables: list[int], keys: int, unused_places: bool) -> None:
    num_tables = max(tables) + 2
    drawn, numbers = batch_of(keys, tables)
    unique = dedup(drawn, numbers, num_tables, world_size)
    counted = torch.full((world_size, num_tables), -1)
    runs = _Runs.create(world_size, [num_tables], CPU)
    runs.count(with_unused_places(unique) if unused_places else unique, out=counted.view(-1))
    expected = Counter(
        (oracle.owner(key, world_size), table) for key, table in {*zip(drawn.tolist(), numbers.tolist())}
    )
    for rank in range(world_size):
        assert counted[rank].tolist() == [expected[rank, table] for table in range(num_tables)]
    assert runs.tables.tolist() == list(range(num_tables)) * world_size
