"""Every way in which the package launches its kernels: table groups and operations called on meta tensors.

What a user can choose is enumerated; what follows from it (tiles, warps, offsets, dtypes of pointers) is left to the
launchers. Sizes that kernels take as plain numbers change no machine code, except where they need 64 bits. Choices that
do not meet in one kernel are not multiplied: bucket capacity and eviction strategy belong to metadata, row layout to
rows. The one kernel that has both a capacity and a row width, the split, uses the capacity for nothing but the slot's
place in its bucket.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ahead_of_time.launches import Launch, recorded_launches
from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.gather import gather_rows
from dynamicemb.kernels.hashing import mix64, owners
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.layout import MAX_CHUNKS, OptimizerKind, RowLayout
from dynamicemb.kernels.note import note, note_touches
from dynamicemb.kernels.outgoing import count_runs, with_occurrences
from dynamicemb.kernels.repeat import repeat
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.tally import tally
from dynamicemb.kernels.update import WeightDecayMode
from dynamicemb.kernels.views import EvictionView, KeyStatus, TouchView
from dynamicemb.options import (
    BUCKET_CAPACITIES,
    EMBEDDING_DTYPES,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
)
from dynamicemb.planner.capacity import DIM_MULTIPLE, MAX_DIM
from dynamicemb.table.config import TableConfig
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["ALL", "SOME", "Choices", "group_step", "launches_of", "notes", "width_classes"]

META = torch.device("meta")
#: The layout with which everything that has nothing to do with rows is launched.
USUAL_LAYOUT = RowLayout(128, torch.float32, OptimizerKind.ADAM)
USUAL_CAPACITY = 128
#: Keys of a batch: one tile in part, and many tiles.
BATCHES = (5, 1 << 20)
#: Keys of a batch whose number needs 64 bits.
LONG_BATCH = 1 << 31
#: Tables of a group: positions are sorted by 0 and, with two ranks, by 1, 2 and 4 bytes of (owner, table).
TABLE_COUNTS = (1, 3, 300, 20_000)
WORLD_SIZE = 2
#: First values: drawn from a normal distribution, for which kernels are compiled on their own, and any other ones.
NORMAL, OTHER = (
    DynamicEmbInitializerArgs(mode) for mode in (DynamicEmbInitializerMode.NORMAL, DynamicEmbInitializerMode.DEBUG)
)
#: Rows of a table at first: no batch makes it ask for its size.
INIT_CAPACITY = 1 << 33


@dataclass(frozen=True)
class Choices:
    """What is enumerated.

    Attributes:
        layouts: of rows, each with every operation.
        capacities: of buckets, each with every eviction strategy.
        gradient_dims: columns of gradients, and of rows that travelled, each with every dtype.
    """

    layouts: tuple[RowLayout, ...]
    capacities: tuple[int, ...]
    gradient_dims: tuple[int, ...]


def width_classes() -> list[int]:
    """Row widths that the options allow: each power of two, and the narrowest row that takes tiles of that width.

    The latter is an odd multiple of :data:`DIM_MULTIPLE`, so that 16-bit rows of it begin at multiples of 8 bytes only.
    """
    exact = [1 << bit for bit in range(MAX_DIM.bit_length()) if DIM_MULTIPLE <= 1 << bit <= MAX_DIM]
    ragged = [columns // 2 + DIM_MULTIPLE for columns in exact if columns // 2 > DIM_MULTIPLE]
    return sorted({*exact, *ragged})


#: Everything that the package can launch.
ALL = Choices(
    layouts=tuple(RowLayout(*choice) for choice in itertools.product(width_classes(), EMBEDDING_DTYPES, OptimizerKind)),
    capacities=BUCKET_CAPACITIES,
    gradient_dims=tuple(width_classes()),
)
#: A part of it with every kernel, optimizer and dtype, the commonest layout and the corners. Gradients meet SGD.
SOME = Choices(
    layouts=(
        USUAL_LAYOUT,
        RowLayout(4, torch.bfloat16, OptimizerKind.ADAGRAD),
        RowLayout(20, torch.bfloat16, OptimizerKind.ADAM),
        RowLayout(1024, torch.float16, OptimizerKind.ROWWISE_ADAGRAD),
    ),
    capacities=(8, 256),
    gradient_dims=(128,),
)


def launches_of(choices: Choices) -> list[Launch]:
    """Each distinct launch once. Needs no GPU and next to no memory."""
    with recorded_launches() as launches:
        _hashing_and_dedup()
        for batch in BATCHES:
            notes(batch)
        for layout, batch in itertools.product(choices.layouts, BATCHES):
            for mode in weight_decay_modes(layout.optimizer):
                group_step(layout, batch=batch, weight_decay_mode=mode)
            group_step(layout, batch=batch, initializer=NORMAL)
        for capacity, strategy in itertools.product(choices.capacities, DynamicEmbEvictStrategy):
            group_step(USUAL_LAYOUT, capacity, strategy)
        for dim, dtype in itertools.product(choices.gradient_dims, EMBEDDING_DTYPES):
            _duplicates(dim, dtype)
        _long_batches()
    return launches


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def weight_decay_modes(optimizer: OptimizerKind) -> list[WeightDecayMode]:
    """Those that the optimizer applies."""
    return sorted({OptimizerConfig(optimizer, weight_decay_mode=mode).applied_weight_decay for mode in WeightDecayMode})


def _group(
    layout: RowLayout,
    capacity: int,
    strategy: DynamicEmbEvictStrategy,
    weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE,
    initializer: DynamicEmbInitializerArgs = OTHER,
) -> TableGroup:
    """Two tables of which the first may double; keys that are missing in evaluation get values."""
    configs = [
        TableConfig(
            name=f"table {table}",
            dim=layout.dim,
            max_capacity=2 * INIT_CAPACITY,
            init_capacity=INIT_CAPACITY,
            embedding_dtype=layout.embedding_dtype,
            bucket_capacity=capacity,
            evict_strategy=strategy,
            initializer=initializer,
            eval_initializer=initializer,
            optimizer=OptimizerConfig(kind=layout.optimizer, weight_decay_mode=weight_decay_mode),
        )
        for table in range(2)
    ]
    return TableGroup(configs, WORLD_SIZE, META)


def group_step(
    layout: RowLayout,
    capacity: int = USUAL_CAPACITY,
    strategy: DynamicEmbEvictStrategy = DynamicEmbEvictStrategy.LRU,
    batch: int = BATCHES[-1],
    gradient_dtype: torch.dtype = torch.float32,
    weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE,
    initializer: DynamicEmbInitializerArgs = OTHER,
) -> None:
    """Everything that happens to a group of tables: training, evaluation and a doubling."""
    group = _group(layout, capacity, strategy, weight_decay_mode, initializer)
    keys, tables = _meta(batch), _meta(batch, dtype=torch.int32)
    occurrences = _meta(batch) if strategy is DynamicEmbEvictStrategy.LFU else None
    rows, lookup = group.train_lookup(keys, tables, occurrences)
    group.apply_gradients(lookup, rows.to(gradient_dtype))
    group.eval_lookup(keys, tables)
    group.storage.double(0)


def _hashing_and_dedup() -> None:
    for batch in BATCHES:
        mix64(_meta(batch))
        owners(_meta(batch), WORLD_SIZE)
        repeat(_meta(WORLD_SIZE, dtype=torch.int32), _meta(WORLD_SIZE), batch)
        for tables in TABLE_COUNTS:
            unique = dedup(_meta(batch), _meta(batch, dtype=torch.int32), tables, WORLD_SIZE)
            count_runs(unique, _meta(WORLD_SIZE, tables))
            with_occurrences(unique)


def notes(batch: int) -> None:
    """A lookup whose changes are noted, by evictions alone and by touches too, and a late update of it."""
    unique = dedup(_meta(batch), _meta(batch, dtype=torch.int32), 2, WORLD_SIZE)
    ticks = _meta(1 << 16, dtype=torch.int32)
    log = EvictionView(_meta(1), _meta(1), _meta(1 << 16), ticks, ticks)
    touches = TouchView(ticks, _meta(2 * MAX_CHUNKS))
    insertion = Insertion(_meta(batch, dtype=torch.int8), _meta(batch), _meta(batch))
    evicted = tally(unique, insertion.status, _meta(2, len(KeyStatus)), _meta(2), log)
    assert evicted is not None
    for noted in (None, touches):
        note(unique, _meta(batch), insertion, evicted, log, noted)
    note_touches(unique, _meta(batch), log.tick, touches)


def _duplicates(dim: int, dtype: torch.dtype) -> None:
    """Rows of distinct keys to those of a batch, the sums on the way back, and sums in front of an optimizer's step,
    which knows nothing of their dtype."""
    for batch in BATCHES:
        gather_rows(_meta(batch, dim, dtype=dtype), _meta(batch))
        unique = dedup(_meta(batch), _meta(batch, dtype=torch.int32), 1, WORLD_SIZE)
        segment_sum(_meta(batch), unique)
        segment_sum(_meta(batch, dim, dtype=dtype), unique)
        group_step(RowLayout(dim, torch.float32, OptimizerKind.SGD), batch=batch, gradient_dtype=dtype)


def _long_batches() -> None:
    """Batches that are not sorted may be longer than what ``torch.sort`` takes, 2**31 - 1."""
    keys = _meta(LONG_BATCH)
    repeat(_meta(WORLD_SIZE, dtype=torch.int32), _meta(WORLD_SIZE), LONG_BATCH)
    mix64(keys)
    owners(keys, WORLD_SIZE)
    group = _group(USUAL_LAYOUT, USUAL_CAPACITY, DynamicEmbEvictStrategy.LRU)
    group.eval_lookup(keys, _meta(LONG_BATCH, dtype=torch.int32))
