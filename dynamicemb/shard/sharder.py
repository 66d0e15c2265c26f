"""The sharder that users put in place of torchrec's."""

from __future__ import annotations

from typing import Optional

import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollection

from dynamicemb.shard.collection import ShardedDynamicEmbeddingCollection

__all__ = ["DynamicEmbeddingCollectionSharder"]


class DynamicEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """Shards an ``EmbeddingCollection`` whose plan has dynamic tables; used exactly as torchrec's sharder.

    Args:
        fused_params: optimizer and its numbers for tables that ``apply_optimizer_in_backward`` has not given one.
        qcomm_codecs_registry: quantised communication, for static and dynamic tables.
        use_index_dedup: deduplicate the ids of static tables before they travel (on the CPU too, where torchrec
            cannot). Ids of dynamic tables always are: their lookup needs the distinct keys anyway. So are those of
            data-parallel tables on a CPU, which torchrec looks up wrongly there otherwise.
    """

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: Optional[torch.device] = None,
        module_fqn: Optional[str] = None,
    ) -> ShardedDynamicEmbeddingCollection:
        """The sharded module. ``params`` comes from :class:`~dynamicemb.planner.DynamicEmbeddingShardingPlanner`."""
        return ShardedDynamicEmbeddingCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[ShardedDynamicEmbeddingCollection]:
        return ShardedDynamicEmbeddingCollection
