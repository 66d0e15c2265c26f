"""Which tables of a model a call is about, and what the manifest says of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch.distributed as dist
from torch import nn

from dynamicemb.checkpoint.files.manifest import Counters, OptimizerRecord, Placement, TableRecord
from dynamicemb.checkpoint.files.schema import TableSchema
from dynamicemb.checkpoint.ranks import Ranks
from dynamicemb.errors import ConfigError
from dynamicemb.names import MAX_COLLECTION_BYTES, MAX_TABLE_BYTES, did_you_mean, listed, unstorable
from dynamicemb.shard.collective import collective
from dynamicemb.shard.tables import DynamicTable, dynamic_tables
from dynamicemb.table.compatibility import dtype_name, optimizer_name
from dynamicemb.table.group import TableProgress
from dynamicemb.table.optimizers import HYPERPARAMETERS

__all__ = [
    "Collections",
    "TableNames",
    "check_collections",
    "check_storable",
    "chosen",
    "not_stored",
    "progress_of",
    "record_of",
    "schema_of",
    "selected_tables",
    "stored_name",
]

TableNames = Optional[Mapping[str, Iterable[str]]]
#: Path in the checkpoint by path in the model, where they differ.
Collections = Mapping[str, str]


@contextmanager
def chosen(
    call: str, model: nn.Module, table_names: TableNames, pg: Optional[dist.ProcessGroup]
) -> Iterator[tuple[list[DynamicTable], Ranks]]:
    """The tables that ``table_names`` asks for, and the ranks that share them, which enter the body together.

    Args:
        call: what the user has called, for messages.
        model, table_names, pg: its arguments.

    Raises:
        ConfigError: as :func:`selected_tables`; ``pg`` is not the group of the tables, or they have different ones, or
            other ranks ask for other tables.
        RemoteRankError: that happened on another rank.
        CollectiveError: other ranks did not call this.
    """
    every = selected_tables(model, None)
    if len({_group_ranks(table) for table in every}) == 1:
        group, own = every[0].process_group, None
    else:  # which ranks are to learn of an error depends on the tables that are asked for
        own = selected_tables(model, table_names)
        group = _shared_group(own, pg)
    ranks = Ranks(group)
    with collective(call, group):
        yield _agreed(lambda: own or selected_tables(model, table_names), pg, ranks), ranks


def _agreed(
    select: Callable[[], list[DynamicTable]], pg: Optional[dist.ProcessGroup], ranks: Ranks
) -> list[DynamicTable]:
    """The tables that all ranks ask for. All of them call it together."""
    tables = ranks.locally(select)
    ranks.locally(lambda: _shared_group(tables, pg))
    asked = ranks.gather([table.path for table in tables])
    if other := [rank for rank, paths in enumerate(asked) if paths != asked[0]]:
        raise ConfigError(
            f"table_names: rank {other[0]} asks for {listed(asked[other[0]])}, but rank 0 for {listed(asked[0])}; give "
            "the same on every rank"
        )
    return tables


def check_collections(collections: Collections, model: nn.Module) -> None:
    """Raises ConfigError unless ``collections`` has paths of checkpoints by paths of collections of the model."""
    example = "{'model': 'model.net'}"
    if not isinstance(collections, Mapping):
        raise ConfigError(
            f"collections={collections!r} is {type(collections).__name__}, not a mapping; give the path in the "
            f"checkpoint by the path in the model, such as {example}"
        )
    known = list(dict.fromkeys(table.collection for table in dynamic_tables(model)))
    for here, there in collections.items():
        if here not in known:
            hint = did_you_mean(here, known) if isinstance(here, str) else ""
            raise ConfigError(
                f"collections: the model has no collection {here!r} with dynamic tables{hint}; it has {listed(known)}"
            )
        if not isinstance(there, str):
            raise ConfigError(f"collections[{here!r}]={there!r} is not the path of a collection; give a str: {example}")


def stored_name(
    stored: Container[tuple[str, str]], table: DynamicTable, collections: Collections
) -> Optional[tuple[str, str]]:
    """Where a checkpoint has ``table``: under what ``collections`` says, else, as a delta that was written later may,
    under the path that the model has; None: nowhere."""
    for collection in (collections.get(table.collection, table.collection), table.collection):
        if (collection, table.name) in stored:
            return collection, table.name
    return None


def not_stored(where: object, stored: Iterable[tuple[str, str]], table: DynamicTable, collections: Collections) -> str:
    """What is to be said of a table that the checkpoint ``where`` does not have."""
    known = list(stored)
    asked = collections.get(table.collection, table.collection)
    others = [collection for collection, name in known if name == table.name]
    remedy = "name the tables to load in table_names"
    if others:
        moved = f"collections={{{table.collection!r}: {others[0]!r}}} (--collection {table.collection}={others[0]})"
        remedy = f"if it has moved, give {moved}, else {remedy}"
    has = listed("/".join(name) for name in known) or "no tables"
    return f"{where} has no table '{table.name}' in '{asked}', but {has}; {remedy}"


def check_storable(tables: Iterable[DynamicTable]) -> None:
    """Raises ConfigError for the first table whose name, or that of its collection, a checkpoint cannot hold."""
    for table in tables:
        for what, name, limit in (
            ("table", table.name, MAX_TABLE_BYTES),
            ("collection", table.collection, MAX_COLLECTION_BYTES),
        ):
            if reason := unstorable(name, limit):
                raise ConfigError(f"{what} {name!r} cannot be stored in a checkpoint: {reason}; rename it")


def selected_tables(model: nn.Module, table_names: TableNames) -> list[DynamicTable]:
    """The dynamic tables that ``table_names`` asks for, by collection path; None: all.

    Raises:
        ConfigError: the model has no dynamic tables, or none of that name; or ``table_names`` asks for none, or is not
            names by path.
    """
    tables = dynamic_tables(model)
    if not tables:
        raise ConfigError(
            "the model has no dynamic tables; give the sharded model, such as the DistributedModelParallel"
        )
    if table_names is None:
        return tables
    wanted = _wanted(table_names)
    here = {(table.collection, table.name): table for table in tables}
    for collection, name in wanted:
        if (collection, name) not in here:
            hint = did_you_mean(f"{collection}/{name}", [table.path for table in tables])
            raise ConfigError(
                f"table_names: the model has no dynamic table {name!r} in {collection!r}; "
                f"it has {listed(table.path for table in tables)}{hint}"
            )
    return [table for table in tables if (table.collection, table.name) in wanted]


def _wanted(table_names: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """(collection, name) of every table that is asked for."""
    example = "{'model.embeddings': ['item']}"
    if not isinstance(table_names, Mapping):
        raise ConfigError(
            f"table_names={table_names!r} is {type(table_names).__name__}, not a mapping; give names of tables by the "
            f"path of their collection, such as {example}, or None for all tables"
        )
    wanted = []
    for collection, names in table_names.items():
        if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
            raise ConfigError(f"table_names[{collection!r}]={names!r} is not a list of names; give one: {example}")
        own = [*names]
        if not own:
            raise ConfigError(f"table_names[{collection!r}] names no table; name some, or leave {collection!r} out")
        for name in [collection, *own]:
            if not isinstance(name, str):
                raise ConfigError(f"table_names: {name!r} is not the name of a table; give a str: {example}")
        if twice := [name for name in own if own.count(name) > 1]:
            raise ConfigError(f"table_names[{collection!r}] names {twice[0]!r} twice; name each table once")
        wanted += [(collection, name) for name in own]
    if not wanted:
        raise ConfigError(f"table_names names no table; give names of tables, such as {example}, or None for all")
    return wanted


def _group_ranks(table: DynamicTable) -> Optional[tuple[int, ...]]:
    return None if table.process_group is None else tuple(dist.get_process_group_ranks(table.process_group))


def _shared_group(tables: Sequence[DynamicTable], pg: Optional[dist.ProcessGroup]) -> Optional[dist.ProcessGroup]:
    """The ranks that share the tables.

    Raises:
        ConfigError: ``pg`` is another group than that of the tables, or they have different ones.
    """
    groups = [table.process_group for table in tables]
    ranks = [_group_ranks(table) for table in tables]
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
