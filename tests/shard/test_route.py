"""Which memory of a batch is kept for a stream that still works on it, as pipelines ask."""

from __future__ import annotations

from typing import Any, Optional, cast

import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.shard.route import DynamicShardingContext, GroupKeys, OwnedKeys, Route


class OnDevice:
    """Stands for a tensor of a GPU."""

    is_cuda = True

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


STREAM: Any = object()


def names_of_unique() -> list[str]:
    return list(vars(dedup(torch.tensor([1]), torch.tensor([0], dtype=torch.int32), 1, 1)))


@pytest.mark.parametrize("with_unique", [False, True])
@pytest.mark.parametrize("with_occurrences", [False, True])
def test_all_tensors_of_owned_keys(with_occurrences: bool, with_unique: bool) -> None:
    tensors: list[Any] = []
    owned = OwnedKeys([])
    for _ in range(2):
        keys, tables = [OnDevice() for _ in range(2)]
        occurrences = OnDevice() if with_occurrences else None
        unique = {name: OnDevice() for name in names_of_unique()} if with_unique else {}
        tensors += [keys, tables, *([occurrences] if occurrences else []), *unique.values()]
        owned.groups.append(
            GroupKeys(
                cast(torch.Tensor, keys),
                cast(torch.Tensor, tables),
                cast(Optional[torch.Tensor], occurrences),
                [[1]],
                UniqueKeys(**cast(Any, unique)) if with_unique else None,
            )
        )
    owned.record_stream(STREAM)
    assert all(tensor.streams == [STREAM] for tensor in tensors)


def test_all_tensors_of_a_route_through_its_context() -> None:
    names = names_of_unique()
    tensors = {name: OnDevice() for name in names}
    context = DynamicShardingContext(route=Route(UniqueKeys(**cast(Any, tensors))))
    context.record_stream(STREAM)
    assert {name: tensor.streams for name, tensor in tensors.items()} == {name: [STREAM] for name in names}


def test_a_route_without_keys_has_no_memory() -> None:
    DynamicShardingContext(route=Route()).record_stream(STREAM)
    DynamicShardingContext().record_stream(STREAM)


def test_host_memory_belongs_to_no_stream() -> None:
    """The stream is no stream here: torch would refuse it."""
    keys = GroupKeys(torch.tensor([1]), torch.tensor([0], dtype=torch.int32), None, [[1]])
    OwnedKeys([keys.deduplicated(1)]).record_stream(STREAM)
