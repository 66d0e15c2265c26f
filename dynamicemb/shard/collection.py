"""The sharded ``EmbeddingCollection``: torchrec's, with one more kind of sharding."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from dynamicemb.errors import DynamicEmbWarning
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding
from dynamicemb.shard.empty_batch import CollectionContext, one_empty_sample, without_samples
from dynamicemb.shard.ids import with_integer_ids
from dynamicemb.shard.lookup import DynamicLookup
from dynamicemb.shard.route import DynamicShardingContext
from dynamicemb.shard.sharding import DYNAMIC_ROW_WISE, DynamicSequenceSharding
from dynamicemb.shard.static_dedup import dedup_static

__all__ = ["ShardedDynamicEmbeddingCollection"]


class ShardedDynamicEmbeddingCollection(ShardedEmbeddingCollection):
    """torchrec's sharded collection, in which tables planned as dynamic live in hash tables.

    Static tables are sharded as torchrec does it. The dynamic ones form one sharding of their own, which comes last;
    their ids are always deduplicated before they travel, whatever ``use_index_dedup`` says for the static ones.
    Arguments as for torchrec's class.
    """

    def __init__(
        self, module: Any, table_name_to_parameter_sharding: dict[str, ParameterSharding], *args: Any, **kwargs: Any
    ) -> None:
        self._dynamic_tables = [
            config.name
            for config in module.embedding_configs()
            if isinstance(table_name_to_parameter_sharding.get(config.name), DynamicEmbParameterSharding)
        ]
        super().__init__(module, table_name_to_parameter_sharding, *args, **kwargs)

    @property
    def dynamic_lookup(self) -> Optional[DynamicLookup]:
        """The lookup of the dynamic tables; None if the collection has none."""
        for lookup in self._lookups:
            if isinstance(lookup, DynamicLookup):
                return lookup
        return None

    # ------------------------------------------------------------------------------------------ shardings

    @classmethod
    def create_grouped_sharding_infos(
        cls,
        module: EmbeddingCollectionInterface,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        fused_params: Optional[dict[str, Any]],
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        infos_by_type = super().create_grouped_sharding_infos(module, table_name_to_parameter_sharding, fused_params)
        result: dict[str, list[EmbeddingShardingInfo]] = {}
        dynamic: list[EmbeddingShardingInfo] = []
        for sharding_type, infos in infos_by_type.items():
            static = [info for info in infos if not isinstance(info.param_sharding, DynamicEmbParameterSharding)]
            dynamic += [info for info in infos if isinstance(info.param_sharding, DynamicEmbParameterSharding)]
            if static:
                result[sharding_type] = static
        if dynamic:
            result[DYNAMIC_ROW_WISE] = dynamic
        return result

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: Optional[torch.device] = None,
        qcomm_codecs_registry: Optional[dict[str, QuantizedCommCodecs]] = None,
    ) -> EmbeddingSharding[Any, Any, torch.Tensor, torch.Tensor]:
        if sharding_type == DYNAMIC_ROW_WISE:
            return DynamicSequenceSharding(sharding_infos, env, device, qcomm_codecs_registry)
        return super().create_embedding_sharding(sharding_type, sharding_infos, env, device, qcomm_codecs_registry)

    # ------------------------------------------------------------------------------------------ input

    def input_dist(self, ctx: EmbeddingCollectionContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        features = maybe_td_to_kjt(features, None)
        if not self._input_dists:
            self._create_input_dist(features.keys(), ctx)
            self._has_uninitialized_input_dist: bool = False
        if self._dynamic_tables:
            features, error = with_integer_ids(features, self._dynamic_tables)
            if error is not None:
                self._input_dists[-1].reject(error)
        if not features.variable_stride_per_key() and features.stride() == 0:
            assert isinstance(ctx, CollectionContext)
            ctx.no_samples = True
            features = one_empty_sample(features)
        request = super().input_dist(ctx, features)
        if self._dynamic_tables:
            ctx.sharding_contexts[-1] = DynamicShardingContext(
                features_before_input_dist=ctx.sharding_contexts[-1].features_before_input_dist,
                route=request.awaitables[-1].route,
            )
        return request

    def create_context(self) -> EmbeddingCollectionContext:
        return CollectionContext(sharding_contexts=[])

    def _dedup_indices(
        self, ctx: EmbeddingCollectionContext, input_feature_splits: list[KeyedJaggedTensor]
    ) -> list[KeyedJaggedTensor]:
        num_static = len(input_feature_splits) - bool(self._dynamic_tables)
        static, dynamic = input_feature_splits[:num_static], input_feature_splits[num_static:]
        if any(features.values().is_cuda for features in static):
            return super()._dedup_indices(ctx, static) + dynamic
        # torchrec's operator has no CPU kernel.
        deduplicated: list[KeyedJaggedTensor] = []
        for features, sharding in zip(static, self._sharding_type_to_sharding.values(), strict=False):
            features_by_table = [len(table.feature_names) for table in sharding.embedding_tables()]
            unique_features, reverse_indices = dedup_static(features, features_by_table)
            ctx.input_features.append(features)
            ctx.reverse_indices.append(reverse_indices)
            deduplicated.append(unique_features)
        return deduplicated + dynamic

    # ------------------------------------------------------------------------------------------ output

    def output_dist(
        self, ctx: EmbeddingCollectionContext, output: list[torch.Tensor]
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return without_samples(ctx, super().output_dist(ctx, output))

    def compute_and_output_dist(
        self, ctx: EmbeddingCollectionContext, input: KJTList
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return without_samples(ctx, super().compute_and_output_dist(ctx, input))

    # ------------------------------------------------------------------------------------------ state

    def _initialize_torch_state(self, **options: bool) -> None:
        # torchrec has the option `skip_registering` from 1.7 on.
        super()._initialize_torch_state(**options)
        if self._dynamic_tables and not options.get("skip_registering", False):
            self._register_state_dict_hook(self._drop_empty_parameters)
            self._register_load_state_dict_pre_hook(self._skip_dynamic_tables, with_module=True)

    def _weight_keys(self, prefix: str) -> list[str]:
        return [f"{prefix}embeddings.{table}.weight" for table in self._dynamic_tables]

    @staticmethod
    def _drop_empty_parameters(
        self: nn.Module, destination: dict[str, Any], prefix: str, _local_metadata: dict[str, Any]
    ) -> None:
        """The parameter of a dynamic table holds nothing; a state dict that showed it would pretend otherwise."""
        assert isinstance(self, ShardedDynamicEmbeddingCollection)
        for key in self._weight_keys(prefix):
            destination.pop(key, None)
        warnings.warn(
            f"state_dict() does not contain the rows of dynamic tables ({', '.join(self._dynamic_tables)})",
            DynamicEmbWarning,
            stacklevel=2,
        )

    @staticmethod
    def _skip_dynamic_tables(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Rows of a static table cannot be assigned to a dynamic one by position: they belong to ids."""
        assert isinstance(self, ShardedDynamicEmbeddingCollection)
        ignored = []
        for table, key in zip(self._dynamic_tables, self._weight_keys(prefix), strict=True):
            if state_dict.pop(key, None) is not None:
                ignored.append(table)
            if key not in self._skip_missing_weight_key:
                self._skip_missing_weight_key.append(key)
        if ignored:
            warnings.warn(
                f"load_state_dict() leaves dynamic tables as they are: rows of static tables ({', '.join(ignored)}) "
                "belong to positions, not to ids",
                DynamicEmbWarning,
                stacklevel=2,
            )
