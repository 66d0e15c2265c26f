"""Sharding of dynamic tables: what stands in place of torchrec's ``EmbeddingCollectionSharder``, and inspection."""

from dynamicemb.installation import require_torchrec

require_torchrec()  # before the first import of torchrec

from dynamicemb.shard.collection import ShardedDynamicEmbeddingCollection
from dynamicemb.shard.inspection import TableStatistics, get_score, set_score, table_statistics
from dynamicemb.shard.sharder import DynamicEmbeddingCollectionSharder

__all__ = [
    "DynamicEmbeddingCollectionSharder",
    "ShardedDynamicEmbeddingCollection",
    "TableStatistics",
    "get_score",
    "set_score",
    "table_statistics",
]
