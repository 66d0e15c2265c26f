"""Which memory of a batch is kept for a stream that still works on it, as pipelines ask."""

from __future__ import annotations

from typing import Any, Optional, cast

import pytest
import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.shard.route import DynamicShardingContext, OwnedKeys, Route


class OnDevice:
    """Stands for a tensor of a GPU."""

    is_cuda = True

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)


STREAM: Any = object()


@pytest.mark.parametrize("with_occurrences", [False, True])
def test_all_tensors_of_owned_keys(with_occurrences: bool) -> None:
    keys, tables, occurrences = OnDevice(), OnDevice(), OnDevice()
    given = cast(Optional[torch.Tensor], occurrences if with_occurrences else None)
    OwnedKeys(cast(torch.Tensor, keys), cast(torch.Tensor, tables), given, [[1]]).record_stream(STREAM)
    assert keys.streams == tables.streams == [STREAM]
    assert occurrences.streams == [STREAM] * with_occurrences


def test_all_tensors_of_a_route_through_its_context() -> None:
    names = list(vars(dedup(torch.tensor([1]), torch.tensor([0], dtype=torch.int32), 1, 1)))
    tensors = {name: OnDevice() for name in names}
    context = DynamicShardingContext(route=Route(UniqueKeys(**cast(Any, tensors))))
    context.record_stream(STREAM)
    assert {name: tensor.streams for name, tensor in tensors.items()} == {name: [STREAM] for name in names}


def test_a_route_without_keys_has_no_memory() -> None:
    DynamicShardingContext(route=Route()).record_stream(STREAM)
    DynamicShardingContext().record_stream(STREAM)


def test_host_memory_belongs_to_no_stream() -> None:
    """The stream is no stream here: torch would refuse it."""
    OwnedKeys(torch.tensor([1]), torch.tensor([0], dtype=torch.int32), None, [[1]]).record_stream(STREAM)
