"""What a user can ask of the dynamic tables of a sharded model, and the scores that a user can give."""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
import torch.distributed as dist
from torch import nn

from dynamicemb.errors import ConfigError
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.shard.tables import DynamicTable, all_ranks, dynamic_tables

__all__ = ["TableStatistics", "get_score", "set_score", "table_statistics"]


@dataclass(frozen=True)
class TableStatistics:
    """One table, added up over all ranks. Keys are counted once in each training lookup; evaluation is not counted.

    Attributes:
        size: rows in the table.
        capacity: rows that fit when it has grown to its full size.
        slots: rows that fit now.
        load_factor: size / capacity.
        hits: keys that were there.
        misses: keys that were not (inserted or refused).
        evicted: rows that gave way to others.
        refused: keys that found no place.
    """

    size: int
    capacity: int
    slots: int
    load_factor: float
    hits: int
    misses: int
    evicted: int
    refused: int


def _tables(model: nn.Module) -> dict[str, DynamicTable]:
    """Every dynamic table by name. Names that several collections use are prefixed with the path of the collection."""
    tables = dynamic_tables(model)
    uses = Counter(table.name for table in tables)
    return {table.name if uses[table.name] == 1 else f"{table.collection}.{table.name}": table for table in tables}


def table_statistics(model: nn.Module) -> dict[str, TableStatistics]:
    """Statistics of every dynamic table of ``model`` by name. All ranks call it together.

    Waits for the device once, and exchanges numbers once, for all tables that share a process group. A name that
    several collections use is prefixed with the path of the collection, here and in the functions below.

    Raises:
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    tables = _tables(model)
    with all_ranks("table_statistics()", tables.values()):
        return _statistics(tables)


def _statistics(tables: Mapping[str, DynamicTable]) -> dict[str, TableStatistics]:
    sharing: dict[tuple[int, torch.device], list[str]] = {}
    for name, table in tables.items():
        sharing.setdefault((id(table.process_group), table.group.device), []).append(name)
    result: dict[str, TableStatistics] = {}
    for names in sharing.values():
        result.update(zip(names, _added_up([tables[name] for name in names]), strict=True))
    return {name: result[name] for name in tables}


def _added_up(tables: Sequence[DynamicTable]) -> list[TableStatistics]:
    """Of tables that share a process group and a device."""
    first = tables[0]
    geometries = [table.group.storage.geometries[table.index] for table in tables]
    sizes = torch.tensor([[size.max_slots, size.slots] for size in geometries]).to(first.group.device)
    # By KeyStatus: found, inserted, replaced (a row was evicted for the key), refused.
    outcomes = torch.stack([table.group.outcomes(table.index) for table in tables])
    numbers = torch.cat([outcomes, sizes], dim=1)
    if first.process_group is not None and first.process_group.size() > 1:
        dist.all_reduce(numbers, group=first.process_group)
    return [
        TableStatistics(size, capacity, slots, size / capacity, hits, size + evicted + refused, evicted, refused)
        for hits, size, evicted, refused, capacity, slots in numbers.tolist()
    ]


def set_score(model: nn.Module, score: Union[int, Mapping[str, int]]) -> None:
    """Sets the score that keys touched or inserted from now on get, in tables with strategy CUSTOMIZED.

    Args:
        model: the sharded model; every rank gives the same scores.
        score: a signed 64-bit number for all such tables, or one by table name. Any integer will do, those of numpy and
            tensors without dimensions among them.

    Raises:
        ConfigError: the model has no table with strategy CUSTOMIZED, a name is that of no such table, or a score is no
            integer or beyond 64 bits. Nothing is changed.
    """
    tables = _tables(model)
    customized = {name: table for name, table in tables.items() if _is_customized(table)}
    if not customized:
        raise ConfigError(
            f"the model has no table with evict_strategy CUSTOMIZED, which set_score is for; {_described(tables)}"
        )
    by_name = dict(score) if isinstance(score, Mapping) else dict.fromkeys(customized, score)
    numbers = {name: _checked_score(name, number, customized) for name, number in by_name.items()}
    for name, number in numbers.items():
        table = customized[name]
        # Not an assignment: that would copy from the host, and wait for the device.
        table.group.custom_scores[table.index].fill_(number)


def get_score(model: nn.Module) -> dict[str, int]:
    """The score that touched keys get now, by table: the clock (LRU) or the number last given (CUSTOMIZED).

    Tables with strategy LFU have no such number and are left out. Waits for the device.

    Raises:
        ConfigError: the model has no dynamic tables.
    """
    tables = _tables(model)
    if not tables:
        raise ConfigError(_described(tables))
    result = {}
    for name, table in tables.items():
        if table.group.evict_strategy is DynamicEmbEvictStrategy.LRU:
            result[name] = int(table.group.clock[table.index])
        elif _is_customized(table):
            result[name] = int(table.group.custom_scores[table.index])
    return result


def _is_customized(table: DynamicTable) -> bool:
    return table.group.evict_strategy is DynamicEmbEvictStrategy.CUSTOMIZED


def _described(tables: Mapping[str, DynamicTable]) -> str:
    if not tables:
        return (
            "the model has no dynamic tables; give the model that DistributedModelParallel returned, sharded by "
            "dynamicemb.shard.DynamicEmbeddingCollectionSharder"
        )
    return "its tables: " + ", ".join(f"{name} ({table.group.evict_strategy.name})" for name, table in tables.items())


def _checked_score(name: object, score: Any, customized: Mapping[str, DynamicTable]) -> int:
    if name not in customized:
        close = difflib.get_close_matches(str(name), customized, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ConfigError(f"table '{name}'{hint} has no customized score; tables that have: {', '.join(customized)}")
    is_truth = isinstance(score, bool) or str(getattr(score, "dtype", "")) in ("bool", "torch.bool")
    try:
        if is_truth or getattr(score, "ndim", 0) > 0:
            raise TypeError
        number = operator.index(score)
    except TypeError:
        raise ConfigError(
            f"table '{name}': score {score!r} is a {type(score).__name__}, but a score is one signed 64-bit integer; "
            "scale and round fractions, for example int(score * 1000)"
        ) from None
    if not -(2**63) <= number < 2**63:
        raise ConfigError(f"table '{name}': score {number} does not fit in a signed 64-bit integer")
    return number
