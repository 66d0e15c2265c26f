"""Every launch of a first run on a GPU: of the topics of ``run_gpu.py``, of ``tests/gpu``, and of what is small there.

The tables are those that the topics and the tests make, moved to meta tensors: their sizes, row layouts, initializers
and optimizers are read from where they are defined. What happens to them is a life of all operations, since a kernel
that is compiled in vain costs a second here, and one that is missing costs a second there. ``dry`` takes the small
sizes of both, which can be compared with what really is launched.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from gpu import ceilings, dedup, kernels, model, sides, table
from gpu.full_table import FullTable
from gpu.ids import Batch
from gpu.random_reads import PROGRAM_WORDS, launched_reads
from gpu.tables import DynamicTables

from ahead_of_time.configurations import notes
from dynamicemb.kernels.dedup import dedup as deduplicate
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather, gather_rows
from dynamicemb.kernels.hashing import mix64, owners
from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.kernels.outgoing import count_runs, with_occurrences
from dynamicemb.kernels.repeat import repeat
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.table.config import TableConfig
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["device_run"]

META = torch.device("meta")
#: Slots of a table at first: no batch makes it ask for its size, and its numbers need no more bits than those of any.
SLOTS = 1 << 29
#: Keys of a batch: one tile in part, and many tiles.
BATCHES = (5, 1 << 20)
WORLD_SIZES = (1, 3)


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _batch(entries: int) -> Batch:
    return Batch(_meta(entries), _meta(entries, dtype=torch.int32))


def device_run(dry: bool = False) -> None:
    """Launches everything. Nothing is read back, so that meta tensors and an interception are enough."""
    _what_is_small()
    _ceilings(ceilings.DRY if dry else ceilings.FULL)
    _dedup(dedup.DRY if dry else dedup.FULL)
    _steps(sides.DRY if dry else sides.FULL)
    _row_kernels(kernels.DRY if dry else kernels.FULL)
    _large_tables(table.DRY if dry else table.FULL)
    _model(model.DRY if dry else model.FULL)
    for configs, world_size in _tested_groups(dry):
        _live(configs, world_size)


# ----------------------------------------------------------------------------------------------- topics of run_gpu.py


def _what_is_small() -> None:
    for entries, world_size in itertools.product(BATCHES, WORLD_SIZES):
        mix64(_meta(entries))
        owners(_meta(entries), world_size)
        repeat(_meta(world_size, dtype=torch.int32), _meta(world_size), entries)
        unique = deduplicate(_meta(entries), _meta(entries, dtype=torch.int32), 1, world_size)
        count_runs(unique, _meta(world_size, 1))
        with_occurrences(unique)
        notes(entries)


def _ceilings(size: ceilings.Size) -> None:
    words = _meta(PROGRAM_WORDS * 64)
    for width_bytes in ceilings.WIDTHS_BYTES:
        launched_reads(words, width_bytes // ceilings.WORD_BYTES, size.reads, salt=1)


def _dedup(size: dedup.Size) -> None:
    for tables, entries in itertools.product(size.tables, (*BATCHES, *size.ids)):
        batch = _batch(entries)
        deduplicate(batch.ids, batch.tables, tables, 1)


def _steps(size: sides.Size) -> None:
    for kind in sides.OPTIMIZERS:
        _train(DynamicTables(size.tables, size.rows, size.dim, OptimizerConfig(kind), META))


def _model(size: model.Size) -> None:
    _train(DynamicTables(size.features, size.rows, size.dim, model.OPTIMIZER, META))


def _train(tables: DynamicTables) -> None:
    for entries in BATCHES:
        rows = tables.train(_batch(entries))
        rows.backward(torch.empty_like(rows))
        tables.read(_batch(entries))
        tables.read_with_initializer(_batch(entries))


def _row_kernels(size: kernels.Size) -> None:
    for dim, dtype, kind in itertools.product(size.dims, size.dtypes, OptimizerKind):
        name = f"rows of {RowLayout(dim, dtype, kind).row_bytes} bytes"
        config = TableConfig(
            name, dim, SLOTS, init_capacity=SLOTS, embedding_dtype=dtype, optimizer=OptimizerConfig(kind)
        )
        _live([config] * size.tables, 1)


def _large_tables(size: table.Size) -> None:
    for dim in size.dims:
        full = FullTable(max(size.slots), dim, size.step_keys, META)
        for entries in BATCHES:
            unique = full.distinct(full.fresh(entries))
            gather(full.storage.view, full.find_or_insert(unique, full.scores(), rows=True))
            gather(full.storage.view, find(full.storage.view, unique))
            gather(full.storage.view, find(full.storage.view, full.in_any_order(full.fresh(entries))))


# ----------------------------------------------------------------------------------------------------------- tests/gpu


def _tested_groups(dry: bool) -> Iterator[tuple[list[TableConfig], int]]:
    """Tables of the tests with their world sizes; in the small sizes of the suite everywhere, or as on a GPU."""
    from tests.gpu import sanitized, test_steady_state
    from tests.gpu.cases import FEW, LARGE, MATRIX

    cases = [*MATRIX, *FEW, *LARGE]
    cases = [case.toy() for case in cases] if dry else [*cases, *(c.toy(c.bucket_capacity) for c in sanitized.CASES)]
    cases += [
        test_steady_state.case_of(*choice) for choice in itertools.product(OptimizerKind, DynamicEmbEvictStrategy)
    ]
    for case in cases:
        yield case.configs(), case.world_size
    yield from ((list(configs), 1) for configs in _sharded_groups())


def _sharded_groups() -> Iterator[Sequence[TableConfig]]:
    """Groups of the tests that go through TorchRec, on one rank."""
    from tests.shard import models, parity

    optimizers = {
        "sgd": OptimizerConfig(OptimizerKind.SGD),
        "adagrad": OptimizerConfig(OptimizerKind.ADAGRAD),
        "rowwise_adagrad": OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD),
        "adam": OptimizerConfig(OptimizerKind.ADAM),
    }
    widths = {table.embedding_dim for part in ("wide", "narrow") for table in _tables_of(parity.TwoCollections(), part)}
    usual = models.table("usual").embedding_dim
    strategies = (
        (DynamicEmbEvictStrategy.LRU, 128),
        (DynamicEmbEvictStrategy.LFU, 128),
        (DynamicEmbEvictStrategy.LFU, 64),
    )
    for dim, name, (strategy, capacity) in itertools.product({*widths, usual}, parity.OPTIMIZERS, strategies):
        config = TableConfig(
            "sharded", dim, SLOTS, init_capacity=SLOTS, bucket_capacity=capacity, evict_strategy=strategy,
            initializer=models.NORMAL, eval_initializer=models.NORMAL, optimizer=optimizers[name],
        )  # fmt: skip
        yield [config, config]


def _tables_of(module: Any, part: str) -> list[Any]:
    return list(getattr(module, part).embedding_configs())


# ---------------------------------------------------------------------------------------------------- lives of a group


def _live(configs: Sequence[TableConfig], world_size: int) -> None:
    """Training, updates of lookups that overlap, evaluation and growth."""
    configs = [_roomy(config) for config in configs]
    group = TableGroup(configs, world_size, META)
    counted: tuple[Optional[Callable[[int], torch.Tensor]], ...] = (None,)
    if group.evict_strategy is DynamicEmbEvictStrategy.LFU:
        counted = (None, _meta)
    for entries, counts in itertools.product(BATCHES, counted):
        batch = _batch(entries)
        first = group.train_lookup(batch.ids, batch.tables, None if counts is None else counts(entries))
        second = group.train_lookup(batch.ids, batch.tables, None if counts is None else counts(entries))
        for rows, lookup in (second, first):
            group.apply_gradients(lookup, rows)
            segment_sum(rows, lookup.unique)
            segment_sum(_meta(entries), lookup.unique)
            gather_rows(rows.to(group.storage.layout.embedding_dtype), lookup.unique.inverse)
        group.eval_lookup(batch.ids, batch.tables)
    for number, config in enumerate(configs):
        if config.max_capacity > SLOTS:
            group.storage.double(number)


def _roomy(config: TableConfig) -> TableConfig:
    """So large that no batch makes it ask for its size; it may double if the table may grow."""
    grows = config.init_capacity != config.max_capacity
    return dataclasses.replace(config, init_capacity=SLOTS, max_capacity=SLOTS * (2 if grows else 1))
