"""The sharding of the dynamic tables of one collection: what torchrec builds distributions and lookups from."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Optional

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseEmbeddingLookup,
    BaseSparseFeaturesDist,
    EmbeddingSharding,
    EmbeddingShardingInfo,
)
from torchrec.distributed.types import QuantizedCommCodecs, ShardingEnv, ShardMetadata
from torchrec.modules.embedding_configs import EmbeddingTableConfig

from dynamicemb.errors import ConfigError, DynamicEmbWarning
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding
from dynamicemb.shard.input_dist import DynamicInputDist
from dynamicemb.shard.lookup import DynamicLookup, group_tables
from dynamicemb.shard.output_dist import DynamicOutputDist
from dynamicemb.shard.route import DynamicShardingContext, OwnedKeys
from dynamicemb.table.config import TableConfig
from dynamicemb.table.optimizers import ignored_parameters, optimizer_from_fused_params

__all__ = ["DYNAMIC_ROW_WISE", "DynamicSequenceSharding"]

#: Stands beside torchrec's sharding types in the collection's own tables.
DYNAMIC_ROW_WISE = "dynamic_row_wise"


def _table_config(info: EmbeddingShardingInfo) -> TableConfig:
    sharding = info.param_sharding
    assert isinstance(sharding, DynamicEmbParameterSharding)
    name = info.embedding_config.name
    fused_params = info.fused_params or {}
    optimizer = optimizer_from_fused_params(name, fused_params)
    config = TableConfig.from_options(name, sharding.dynamicemb_options, optimizer)
    _check_precision(config, fused_params.get("weights_precision"))
    for text in ignored_parameters(name, optimizer, fused_params, config.embedding_dtype):
        warnings.warn(text, DynamicEmbWarning, stacklevel=2)
    return config


def _check_precision(config: TableConfig, weights_precision: Any) -> None:
    if weights_precision is not None and weights_precision.as_dtype() != config.embedding_dtype:
        raise ConfigError(
            f"table '{config.name}': fused parameter weights_precision={weights_precision.name} differs from the "
            f"dtype of its rows, {config.embedding_dtype}; set embedding_dtype of its dynamicemb_options, or remove it"
        )


def _output_dtype(infos: list[EmbeddingShardingInfo]) -> torch.dtype:
    dtypes: dict[torch.dtype, str] = {}
    for info in infos:
        given = (info.fused_params or {}).get("output_dtype")
        dtypes[torch.float32 if given is None else given.as_dtype()] = info.embedding_config.name
    if len(dtypes) > 1:
        raise ConfigError(
            f"dynamic tables of one collection have different output_dtypes ({dtypes}); give all of them the same one"
        )
    return next(iter(dtypes))


class DynamicSequenceSharding(EmbeddingSharding[DynamicShardingContext, OwnedKeys, torch.Tensor, torch.Tensor]):
    """All dynamic tables of an ``EmbeddingCollection``: rows belong to ranks by their keys' hash.

    Args:
        sharding_infos: the tables.
        env: torchrec's sharding environment; its (sub-)group is the one that the tables are spread over.
        device: where the tables live.
        qcomm_codecs_registry: torchrec's codecs by operation.

    Raises:
        ConfigError: an optimizer or a fused parameter that cannot be honoured. Nothing has been allocated.
    """

    def __init__(
        self,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: Optional[torch.device] = None,
        qcomm_codecs_registry: Optional[dict[str, QuantizedCommCodecs]] = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        # With 2D parallelism the tables are replicated, and spread over the ranks of one replica.
        self._pg: Optional[dist.ProcessGroup] = getattr(env, "sharding_pg", env.process_group)
        self._device = device or torch.device("cpu")
        config_by_name = {info.embedding_config.name: _table_config(info) for info in sharding_infos}
        self._groups = group_tables(list(config_by_name.values()))
        info_by_name = {info.embedding_config.name: info for info in sharding_infos}
        #: The tables in the order of their groups, which is the order of features and of table numbers.
        self._infos = [info_by_name[config.name] for configs in self._groups for config in configs]
        self._output_dtype = _output_dtype(self._infos)
        self._frozen = [info.embedding_config.name for info in self._infos if not info.param.requires_grad]
        self._lookup: Optional[DynamicLookup] = None

    def create_input_dist(self, device: Optional[torch.device] = None) -> BaseSparseFeaturesDist[OwnedKeys]:
        counts_occurrences = any(
            config.evict_strategy is DynamicEmbEvictStrategy.LFU for configs in self._groups for config in configs
        )
        infos = iter(self._infos)
        features_by_group = [
            [len(info.embedding_config.feature_names) for info in itertools.islice(infos, len(configs))]
            for configs in self._groups
        ]
        lookup = self._lookup
        assert lookup is not None, "torchrec makes the lookups first"
        return DynamicInputDist(
            self._pg, features_by_group, counts_occurrences, device or self._device, lookup.takes_gradients,
            lookup.trains,
        )  # fmt: skip

    def create_lookup(
        self,
        device: Optional[torch.device] = None,
        fused_params: Optional[dict[str, Any]] = None,
        feature_processor: Optional[Any] = None,
    ) -> BaseEmbeddingLookup[OwnedKeys, torch.Tensor]:
        self._lookup = DynamicLookup(self._groups, self._pg, device or self._device, self._output_dtype, self._frozen)
        return self._lookup

    def create_output_dist(
        self, device: Optional[torch.device] = None
    ) -> BaseEmbeddingDist[DynamicShardingContext, torch.Tensor, torch.Tensor]:
        return DynamicOutputDist(self._pg, self.qcomm_codecs_registry)

    def embedding_tables(self) -> list[EmbeddingTableConfig]:
        return [info.embedding_config for info in self._infos]

    def feature_names(self) -> list[str]:
        return [feature for table in self.embedding_tables() for feature in table.feature_names]

    def embedding_names(self) -> list[str]:
        return [name for table in self.embedding_tables() for name in table.embedding_names]

    def embedding_names_per_rank(self) -> list[list[str]]:
        return [self.embedding_names()] * (1 if self._pg is None else self._pg.size())

    def embedding_dims(self) -> list[int]:
        return [table.embedding_dim for table in self.embedding_tables() for _ in table.feature_names]

    def embedding_shard_metadata(self) -> list[Optional[ShardMetadata]]:
        return [None for table in self.embedding_tables() for _ in table.feature_names]
