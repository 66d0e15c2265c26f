"""A rank without a single sample. torchrec cannot shape its tensors then, so it is shown one sample without ids."""

from __future__ import annotations

import torch
from torchrec.distributed.embedding import EmbeddingCollectionContext
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from dynamicemb.table.eager import eager

__all__ = ["CollectionContext", "one_empty_sample", "rows_of_batch"]


class CollectionContext(EmbeddingCollectionContext):
    """torchrec's context of a collection, and whether this rank's batch has no samples."""

    # No field of a dataclass, because torchrec's own context is none before 1.7.

    no_samples: bool = False


def one_empty_sample(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """In place of ``features`` without samples: the same keys, one sample, no ids."""
    keys = features.keys()
    lengths = torch.zeros(len(keys), dtype=features.lengths().dtype, device=features.lengths().device)
    # With the lengths that the host knows, torchrec need not ask the device.
    return KeyedJaggedTensor(
        keys=keys, values=features.values(), lengths=lengths, stride=1, length_per_key=[0] * len(keys)
    )


class _Rows(LazyAwaitable[dict[str, JaggedTensor]]):
    def __init__(self, rows: LazyAwaitable[dict[str, JaggedTensor]], no_samples: bool) -> None:
        super().__init__()
        self._rows, self._no_samples = rows, no_samples

    @eager
    def wait(self) -> dict[str, JaggedTensor]:
        return super().wait()

    def _wait_impl(self) -> dict[str, JaggedTensor]:
        rows_by_feature = self._rows.wait()
        if not self._no_samples:
            return rows_by_feature
        return {
            name: JaggedTensor(values=rows.values(), lengths=rows.lengths()[:0], weights=rows.weights_or_none())
            for name, rows in rows_by_feature.items()
        }


def rows_of_batch(
    context: EmbeddingCollectionContext, rows: LazyAwaitable[dict[str, JaggedTensor]]
) -> LazyAwaitable[dict[str, JaggedTensor]]:
    """``rows``, with the sample that :func:`one_empty_sample` added taken out again if this batch has none.

    The values keep their place in the autograd graph, so that a backward pass takes part in the collectives.
    """
    return _Rows(rows, isinstance(context, CollectionContext) and context.no_samples)
