"""Rows back to the ranks that asked for them, and gradients the other way."""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import BaseEmbeddingDist
from torchrec.distributed.types import Awaitable, CommOp, NoWait, QuantizedCommCodecs

from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.shard.route import DynamicShardingContext
from dynamicemb.shard.transfer import RowTransfer
from dynamicemb.table.function import expand

__all__ = ["DynamicOutputDist"]


class DynamicOutputDist(BaseEmbeddingDist[DynamicShardingContext, torch.Tensor, torch.Tensor]):
    """Sends a row for each key that was received back to its sender, which copies it to every place of the key.

    Args:
        pg: ranks that share the tables; None for a single process without one.
        qcomm_codecs_registry: torchrec's codecs by operation.
    """

    def __init__(
        self, pg: Optional[dist.ProcessGroup], qcomm_codecs_registry: Optional[dict[str, QuantizedCommCodecs]]
    ) -> None:
        super().__init__()
        self._pg = pg
        self._codecs = (qcomm_codecs_registry or {}).get(CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name)

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: Optional[DynamicShardingContext] = None
    ) -> Awaitable[torch.Tensor]:
        """Starts the transfer.

        Args:
            local_embs: float [keys received, dim].
            sharding_ctx: with the route of the batch.

        Returns:
            Awaitable of [ids of this rank's batch, dim].
        """
        assert sharding_ctx is not None and sharding_ctx.route is not None
        route = sharding_ctx.route
        if route.unique is None:
            return NoWait(local_embs)
        assert self._pg is not None
        rows = RowTransfer(local_embs, route.receive_counts, route.send_counts, self._pg, self._codecs)
        return _Expanded(rows, route.unique)


class _Expanded(Awaitable[torch.Tensor]):
    def __init__(self, rows: Awaitable[torch.Tensor], unique: UniqueKeys) -> None:
        super().__init__()
        self._rows, self._unique = rows, unique

    def _wait_impl(self) -> torch.Tensor:
        return expand(self._rows.wait(), self._unique)
