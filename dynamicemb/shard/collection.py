"""The sharded ``EmbeddingCollection``: torchrec's, with one more kind of sharding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from dynamicemb.errors import DynamicEmbError, DynamicEmbWarning
from dynamicemb.planner.gloo import let_threads_finish_at_exit
from dynamicemb.planner.parameter_sharding import DynamicEmbParameterSharding, sharded_by_dynamicemb
from dynamicemb.shard.batches import served
from dynamicemb.shard.collective import collective
from dynamicemb.shard.empty_batch import CollectionContext, one_empty_sample, rows_of_batch
from dynamicemb.shard.lookup import DynamicLookup
from dynamicemb.shard.plan_check import checked_plan
from dynamicemb.shard.restore import exchanged_table, restore_tables, take_entries
from dynamicemb.shard.route import DynamicShardingContext
from dynamicemb.shard.sharded_rows import StagedShardedTensor
from dynamicemb.shard.sharding import DYNAMIC_ROW_WISE, DynamicSequenceSharding
from dynamicemb.shard.state_dict import described_entries, name_entries, table_slots, table_states
from dynamicemb.shard.static_dedup import dedup_replicated, dedup_static
from dynamicemb.shard.tracking import refuse_delta_tracker, refuse_tracker
from dynamicemb.table.eager import eager
from dynamicemb.table.storage import state_memory

__all__ = ["ShardedDynamicEmbeddingCollection"]


class ShardedDynamicEmbeddingCollection(ShardedEmbeddingCollection):
    """torchrec's sharded collection, in which tables planned as dynamic live in hash tables.

    Static tables are sharded as torchrec does it. The dynamic ones form one sharding of their own, which comes last;
    their ids are always deduplicated before they travel, whatever ``use_index_dedup`` says for the static ones.
    ``state_dict()`` and ``load_state_dict()`` are collective, see :mod:`dynamicemb.shard.state_dict`.

    A dynamic table takes updates while ``requires_grad`` of its parameter is set; frozen, it still inserts new ids in
    training. In evaluation rows are part of a graph where gradients are enabled, as torchrec's are, but a backward pass
    changes no table. Writing to the parameter of a dynamic table raises: it has no rows.
    Arguments as for torchrec's class.
    """

    def __init__(
        self,
        module: Any,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        table_name_to_parameter_sharding = checked_plan(module, table_name_to_parameter_sharding, env)
        self._dynamic_tables = [
            config.name
            for config in module.embedding_configs()
            if isinstance(table_name_to_parameter_sharding.get(config.name), DynamicEmbParameterSharding)
        ]
        self._static_tables = [
            config.name for config in module.embedding_configs() if config.name not in self._dynamic_tables
        ]
        self._describes_tables = self._loads_strictly = False
        # torchrec's constructor loads the rows of the static tables that the module has, unless they are on `meta`.
        self._is_complete = False
        super().__init__(module, table_name_to_parameter_sharding, env, *args, **kwargs)
        self._is_complete = True
        # On a CPU fbgemm adds up the rows of a sample of a data-parallel table, unless each id is a sample of its own.
        replicated = ShardingType.DATA_PARALLEL.value in self._sharding_type_to_sharding
        self._use_index_dedup |= replicated and self._device.type == "cpu"
        shardings = self._sharding_type_to_sharding.values()
        self._needed_features = list(dict.fromkeys(name for one in shardings for name in one.feature_names()))
        self._input_keys: list[str] = []
        let_threads_finish_at_exit(self._env.process_group)

    @property
    def dynamic_lookup(self) -> Optional[DynamicLookup]:
        """The lookup of the dynamic tables; None if the collection has none."""
        for lookup in self._lookups:
            if isinstance(lookup, DynamicLookup):
                return lookup
        return None

    # ------------------------------------------------------------------------------------------ trackers

    @property
    def _table_name_to_config(self) -> dict[str, EmbeddingConfig]:
        refuse_delta_tracker(self._dynamic_tables)
        return self._configs_by_table

    @_table_name_to_config.setter
    def _table_name_to_config(self, configs: dict[str, EmbeddingConfig]) -> None:
        self._configs_by_table = configs

    def register_post_lookup_tracker_fn(self, record_fn: Any) -> None:
        """Refused: the function would be given the lookups of dynamic tables, whose keys are none of torchrec's."""
        refuse_tracker(self._dynamic_tables)
        super().register_post_lookup_tracker_fn(record_fn)

    # ------------------------------------------------------------------------------------------ shardings

    @classmethod
    def create_grouped_sharding_infos(
        cls,
        module: EmbeddingCollectionInterface,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        fused_params: Optional[dict[str, Any]],
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        with sharded_by_dynamicemb():
            infos_by_type = super().create_grouped_sharding_infos(
                module, table_name_to_parameter_sharding, fused_params
            )
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

    @eager
    def forward(self, *input: Any, **kwargs: Any) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return super().forward(*input, **kwargs)

    @eager
    def input_dist(self, ctx: EmbeddingCollectionContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        features = maybe_td_to_kjt(features, None)
        error: Optional[DynamicEmbError] = None
        if self._dynamic_tables:
            features, error = served(features, self._needed_features, self._dynamic_tables, self._device)
        if self._input_keys != features.keys():
            # torchrec takes features by their place in the first batch. Only a batch with others costs this again.
            self._input_dists.clear()
            self._inverse_indices_permute_per_sharding = None
            with state_memory():
                self._create_input_dist(features.keys(), ctx)
            self._input_keys, self._has_uninitialized_input_dist = list(features.keys()), False
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
        for features, (kind, sharding) in zip(static, self._sharding_type_to_sharding.items(), strict=False):
            features_by_table = [len(table.feature_names) for table in sharding.embedding_tables()]
            if kind == ShardingType.DATA_PARALLEL.value:
                tables_by_group = [len(group.embedding_tables) for group in sharding._grouped_embedding_configs]
                unique_features, reverse_indices = dedup_replicated(features, features_by_table, tables_by_group)
            else:
                unique_features, reverse_indices = dedup_static(features, features_by_table)
            ctx.input_features.append(features)
            ctx.reverse_indices.append(reverse_indices)
            deduplicated.append(unique_features)
        return deduplicated + dynamic

    # ------------------------------------------------------------------------------------------ output

    @eager
    def compute(self, ctx: EmbeddingCollectionContext, dist_input: KJTList) -> list[torch.Tensor]:
        return super().compute(ctx, dist_input)

    @eager
    def output_dist(
        self, ctx: EmbeddingCollectionContext, output: list[torch.Tensor]
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return rows_of_batch(ctx, super().output_dist(ctx, output))

    @eager
    def compute_and_output_dist(
        self, ctx: EmbeddingCollectionContext, input: KJTList
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        return rows_of_batch(ctx, super().compute_and_output_dist(ctx, input))

    # ------------------------------------------------------------------------------------------ state

    def reset_parameters(self) -> None:
        """Begins again: static tables get new first values, as in torchrec, and dynamic tables are emptied.

        An emptied table is as it was when it was made (rows, scores, clock, counters, steps, size), but for what has
        been set by hand: its learning rate and other hyperparameters, its customized score, and ``requires_grad``. All
        ranks call it together. Waits for the device.
        """
        configs = self._embedding_configs  # type: ignore[has-type]
        self._embedding_configs = [config for config in configs if config.name not in self._dynamic_tables]
        try:
            super().reset_parameters()
        finally:
            self._embedding_configs = configs
        if self._is_complete and self.dynamic_lookup is not None:
            for group in self.dynamic_lookup.groups:
                for table in range(len(group.configs)):
                    group.reset(table)

    def _initialize_torch_state(self, **options: bool) -> None:
        # torchrec has the option `skip_registering` from 1.7 on.
        super()._initialize_torch_state(**options)
        if self.dynamic_lookup is not None:
            for table in table_slots(self.dynamic_lookup):
                name_entries(self.embeddings[table.name], table.layout)
        if not options.get("skip_registering", False):
            if self._dynamic_tables:
                self._register_state_dict_hook(self._add_dynamic_tables)
            self._register_load_state_dict_pre_hook(self._load_dynamic_tables, with_module=True)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. If entries of a dynamic table are missing and ``strict`` is True, no dynamic table changes.

        ``DistributedModelParallel`` calls this; ``load_state_dict`` of a module that contains the collection does not,
        and torch does not tell the modules inside whether they are loaded strictly: dynamic tables of which rows are
        there are loaded then, before torch raises.
        """
        self._loads_strictly = strict
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        finally:
            self._loads_strictly = False

    @contextmanager
    def described_tables(self) -> Iterator[None]:
        """Inside it, ``state_dict()`` has an :class:`~dynamicemb.shard.state_dict.EntryDescription` for each entry of
        a dynamic table: nothing is copied, and nothing is exchanged."""
        before, self._describes_tables = self._describes_tables, True
        try:
            yield
        finally:
            self._describes_tables = before

    @staticmethod
    def _add_dynamic_tables(
        self: nn.Module, destination: dict[str, Any], prefix: str, _local_metadata: dict[str, Any]
    ) -> None:
        """Puts rows in the place of the parameters, which hold nothing; see :mod:`dynamicemb.shard.state_dict`."""
        assert isinstance(self, ShardedDynamicEmbeddingCollection) and self.dynamic_lookup is not None
        for table in self._dynamic_tables:
            destination.pop(f"{prefix}embeddings.{table}.weight", None)
        for key in [key for key in destination if key.startswith(f"{prefix}embeddings.")]:
            if isinstance(destination[key], ShardedTensor):  # of a static table
                destination[key] = StagedShardedTensor.of(destination[key])
        if self._describes_tables:
            states: Mapping[str, Mapping[str, Any]] = described_entries(self.dynamic_lookup)
        else:
            with collective("state_dict()", self.dynamic_lookup.process_group):
                states = table_states(self.dynamic_lookup)
        for table, entries in states.items():
            destination.update({f"{prefix}embeddings.{table}.{name}": value for name, value in entries.items()})

    @staticmethod
    def _pre_load_state_dict_hook(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """torchrec's, which raises a KeyError where a static table is missing; torch is to report that."""
        assert isinstance(self, ShardedDynamicEmbeddingCollection)
        keys = [f"{prefix}embeddings.{table}.weight" for table in self._static_tables]
        missing = [key for key in keys if key not in state_dict]
        state_dict.update((key, torch.empty(0, 0)) for key in missing)
        ShardedEmbeddingCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)
        for key in missing:
            del state_dict[key]

    @staticmethod
    def _load_dynamic_tables(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        _local_metadata: dict[str, Any],
        _strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        """Restores the tables that the state dict has rows of, and reports what is missing of them and of others."""
        assert isinstance(self, ShardedDynamicEmbeddingCollection)
        start = f"{prefix}embeddings."
        error = exchanged_table(state_dict, start, self._static_tables)
        if self.dynamic_lookup is None:
            if error is not None:
                raise error
            return
        parameters = {table: self.embeddings[table].weight for table in self._dynamic_tables}
        taken = take_entries(self.dynamic_lookup, state_dict, start, parameters)
        if not self._is_complete:  # values that the module had before it was sharded: nobody loads a state dict
            return
        missing_keys += taken.missing
        if taken.static:
            warnings.warn(
                f"the state dict has rows of static tables for the dynamic tables {', '.join(taken.static)}: they "
                "are not loaded, since they belong to positions, not to ids; dynamicemb.checkpoint.static.load_static "
                "makes row i the row of id i",
                DynamicEmbWarning,
                stacklevel=2,
            )
        # Rows that do not fit are an error of ours; entries that are missing are one of torch's.
        torch_will_raise = self._loads_strictly and not taken.complete
        with collective("load_state_dict()", self.dynamic_lookup.process_group):
            restore_tables(self.dynamic_lookup, taken, error, change=not torch_will_raise)
