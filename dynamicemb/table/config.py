"""One table as the table layer sees it: every default filled in, every number checked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dynamicemb.kernels.layout import RowLayout, TableGeometry
from dynamicemb.kernels.update import WeightDecayMode
from dynamicemb.options import (
    DynamicEmbCheckMode,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
)
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["GroupKey", "TableConfig"]

_ZEROS = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT)


@dataclass(frozen=True)
class GroupKey:
    """What tables must have in common to share a group: the layout of a row, the bucket, the meaning of a score, and
    what weight decay does."""

    layout: RowLayout
    bucket_capacity: int
    evict_strategy: DynamicEmbEvictStrategy
    weight_decay_mode: WeightDecayMode


@dataclass(frozen=True)
class TableConfig:
    """A table on one rank.

    Attributes:
        name: the table's name; part of what a row's first value depends on.
        dim: columns.
        embedding_dtype: of the stored rows.
        max_capacity, init_capacity: rows on this rank, at most and at first.
        bucket_capacity: slots of a bucket.
        max_load_factor: load above which a table that may grow does so.
        evict_strategy: meaning of the scores.
        initializer, eval_initializer: with their bounds filled in.
        safe_check_mode: what happens when keys are refused.
        seed: of the initializer.
        optimizer: its rule and numbers.
    """

    name: str
    dim: int
    max_capacity: int
    init_capacity: int
    embedding_dtype: torch.dtype = torch.float32
    bucket_capacity: int = 128
    max_load_factor: float = 0.5
    evict_strategy: DynamicEmbEvictStrategy = DynamicEmbEvictStrategy.LRU
    initializer: DynamicEmbInitializerArgs = field(default_factory=DynamicEmbInitializerArgs)
    eval_initializer: DynamicEmbInitializerArgs = _ZEROS
    safe_check_mode: DynamicEmbCheckMode = DynamicEmbCheckMode.IGNORE
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @staticmethod
    def from_options(name: str, options: DynamicEmbTableOptions, optimizer: OptimizerConfig) -> TableConfig:
        """The table that resolved ``options`` (every size and dtype given) describe."""
        assert options.dim is not None and options.embedding_dtype is not None and options.max_capacity is not None
        return TableConfig(
            name=name,
            dim=options.dim,
            max_capacity=options.max_capacity,
            init_capacity=options.init_capacity or options.max_capacity,
            embedding_dtype=options.embedding_dtype,
            bucket_capacity=options.bucket_capacity,
            max_load_factor=options.max_load_factor,
            evict_strategy=options.evict_strategy,
            initializer=options.initializer_args,
            eval_initializer=options.eval_initializer_args or _ZEROS,
            safe_check_mode=options.safe_check_mode,
            seed=options.seed,
            optimizer=optimizer,
        )

    @property
    def layout(self) -> RowLayout:
        return RowLayout(self.dim, self.embedding_dtype, self.optimizer.kind)

    @property
    def group_key(self) -> GroupKey:
        decay_mode = self.optimizer.applied_weight_decay
        return GroupKey(self.layout, self.bucket_capacity, self.evict_strategy, decay_mode)

    def geometry(self) -> TableGeometry:
        """The table's size at first."""
        return TableGeometry.create(self.max_capacity, self.init_capacity, self.bucket_capacity)

    @property
    def missing_reads_as_zeros(self) -> bool:
        """Whether evaluation needs nothing but zeros for keys that are not in the table."""
        initializer = self.eval_initializer
        return initializer.mode is DynamicEmbInitializerMode.CONSTANT and initializer.value == 0.0
