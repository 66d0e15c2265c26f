"""Which tables of a model a call is about, and what the manifest says of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch.distributed as dist
from torch import nn

from dynamicemb.checkpoint.files.manifest import Counters, OptimizerRecord, Placement, TableRecord
from dynamicemb.checkpoint.files.schema import TableSchema
from dynamicemb.errors import ConfigError
from dynamicemb.shard.tables import DynamicTable, dynamic_tables
from dynamicemb.table.compatibility import dtype_name, optimizer_name
from dynamicemb.table.group import TableProgress
from dynamicemb.table.optimizers import HYPERPARAMETERS

__all__ = ["progress_of", "record_of", "schema_of", "selected_tables", "shared_group"]

TableNames = Optional[Mapping[str, Sequence[str]]]


def selected_tables(model: nn.Module, table_names: TableNames) -> list[DynamicTable]:
    """The dynamic tables that ``table_names`` asks for, by collection path; None: all.

    Raises:
        ConfigError: the model has no dynamic tables, or none of that name.
    """
    tables = dynamic_tables(model)
    known = ", ".join(table.path for table in tables)
    if not tables:
        raise ConfigError(
            "the model has no dynamic tables; give the sharded model, such as the DistributedModelParallel"
        )
    if table_names is None:
        return tables
    wanted = {(collection, name) for collection, names in table_names.items() for name in names}
    here = {(table.collection, table.name) for table in tables}
    if missing := sorted(wanted - here):
        collection, name = missing[0]
        raise ConfigError(f"table_names: the model has no dynamic table '{name}' in '{collection}'; it has {known}")
    return [table for table in tables if (table.collection, table.name) in wanted]


def shared_group(tables: Sequence[DynamicTable], pg: Optional[dist.ProcessGroup]) -> Optional[dist.ProcessGroup]:
    """The ranks that share the tables.

    Raises:
        ConfigError: ``pg`` is another group than that of the tables, or they have different ones.
    """
    groups = [table.process_group for table in tables]
    ranks = [None if group is None else tuple(dist.get_process_group_ranks(group)) for group in groups]
    if pg is not None:
        asked = tuple(dist.get_process_group_ranks(pg))
        for table, own in zip(tables, ranks, strict=True):
            if own is not None and own != asked:
                raise ConfigError(
                    f"pg has the ranks {list(asked)}, but table '{table.name}' is spread over {list(own)}; "
                    "leave pg out, and call this on exactly these ranks"
                )
        return pg
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"the tables are spread over different groups of ranks ({sorted(map(str, set(ranks)))}); "
            "name those of one group in table_names"
        )
    return groups[0]


def schema_of(table: DynamicTable, optim: bool) -> TableSchema:
    layout = table.group.storage.layout
    states = tuple((state.name, state.width) for state in layout.states) if optim else ()
    return TableSchema(layout.dim, dtype_name(layout.embedding_dtype), states)


def record_of(table: DynamicTable, optim: bool, progress: Sequence[TableProgress], slots: Sequence[int]) -> TableRecord:
    """What the manifest says of a table, but for its rows and files.

    Args:
        table: of this rank.
        optim: whether optimizer state is saved.
        progress, slots: of the table on each rank. Clocks are the same everywhere; events are added up.
    """
    config, first = table.group.configs[table.index], progress[0]
    initializer: dict[str, Any] = dataclasses.asdict(config.initializer)
    initializer["mode"] = config.initializer.mode.value
    return TableRecord(
        schema=schema_of(table, optim),
        rows=0,
        parts={},
        optimizer=OptimizerRecord(
            kind=optimizer_name(config),
            saved=optim,
            steps=first.steps,
            hyperparameters=dict(zip(HYPERPARAMETERS, first.hyperparameters, strict=True)),
        ),
        evict_strategy=config.evict_strategy.value,
        clock=first.clock,
        custom_score=first.custom_score,
        counters=Counters(
            hits=sum(one.hits for one in progress),
            evicted=sum(one.evicted for one in progress),
            refused=sum(one.refused for one in progress),
        ),
        seed=config.seed,
        initializer=initializer,
        bucket_capacity=config.bucket_capacity,
        placement=Placement(
            world_size=len(slots), max_slots=table.group.storage.geometries[table.index].max_slots, slots=tuple(slots)
        ),
    )


def progress_of(table: DynamicTable, record: TableRecord, optim: bool, first: bool) -> TableProgress:
    """How far training had come when ``record`` was written, as one rank is to have it.

    Args:
        table: of this rank.
        record: of the checkpoint.
        optim: whether the optimizer goes on where it was; otherwise it begins anew, with the numbers it has now.
        first: whether this is the rank that gets the counts of all ranks, so that their sums are right.
    """
    now = table.group.progress(table.index)
    numbers = tuple(record.optimizer.hyperparameters.get(name, own) for name, own in
                    zip(HYPERPARAMETERS, now.hyperparameters, strict=True))  # fmt: skip
    counters = record.counters if first else Counters()
    return TableProgress(
        clock=record.clock,
        steps=record.optimizer.steps if optim else 0,
        custom_score=record.custom_score,
        hits=counters.hits,
        evicted=counters.evicted,
        refused=counters.refused,
        hyperparameters=numbers if optim else now.hyperparameters,
    )
