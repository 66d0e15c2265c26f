"""One table as the table layer sees it: every default filled in, every number checked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dynamicemb.errors import ConfigError
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


def _check_range(initializer: DynamicEmbInitializerArgs, dtype: torch.dtype) -> None:
    """Check that rows of ``dtype`` can hold the numbers that bound what ``initializer`` gives."""
    names = ("value",) if initializer.mode is DynamicEmbInitializerMode.CONSTANT else ("mean", "lower", "upper")
    largest = torch.finfo(dtype).max
    for name in names:
        number = getattr(initializer, name)
        if number is not None and abs(number) > largest:
            raise ConfigError(f"initializer {name}={number} is outside the range of {dtype}, +-{largest:g}")


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
        initializer, eval_initializer: bounds that are not given are filled in as for a table of ``max_capacity`` rows.
        safe_check_mode: what happens when keys are refused.
        seed: of the initializer.
        optimizer: its rule and numbers.

    Raises:
        ConfigError: what :class:`~dynamicemb.options.DynamicEmbTableOptions` refuses, a name that is none, or first
            values that the dtype of the rows cannot hold.
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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"the name of a table is {self.name!r}; use a string that is not empty")
        if not isinstance(self.optimizer, OptimizerConfig):
            raise ConfigError(f"table '{self.name}': optimizer={self.optimizer!r} is not an OptimizerConfig")
        try:
            self._check()
        except ConfigError as error:
            raise ConfigError(f"table '{self.name}': {error}") from error

    def _check(self) -> None:
        for name in ("dim", "embedding_dtype", "max_capacity", "init_capacity"):
            if getattr(self, name) in (None, -1):
                raise ConfigError(f"{name}={getattr(self, name)} is not given")
        options = DynamicEmbTableOptions(
            dim=self.dim,
            embedding_dtype=self.embedding_dtype,
            max_capacity=self.max_capacity,
            init_capacity=self.init_capacity,
            max_load_factor=self.max_load_factor,
            evict_strategy=self.evict_strategy,
            bucket_capacity=self.bucket_capacity,
            initializer_args=self.initializer,
            safe_check_mode=self.safe_check_mode,
            seed=self.seed,
            eval_initializer_args=self.eval_initializer,
        )
        for name in ("initializer", "eval_initializer"):
            initializer = getattr(self, name).resolved(self.max_capacity)
            _check_range(initializer, self.embedding_dtype)
            object.__setattr__(self, name, initializer)
        object.__setattr__(self, "safe_check_mode", options.safe_check_mode)

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
