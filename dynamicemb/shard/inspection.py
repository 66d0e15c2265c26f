"""What a user can ask of the dynamic tables of a sharded model, and the scores that a user can give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional, Union

import torch
import torch.distributed as dist
from torch import nn

from dynamicemb.errors import ConfigError
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.shard.gloo import let_go
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
    """Statistics of every dynamic table of ``model`` by name. All ranks call it together; it waits for the device.

    A name that several collections use is prefixed with the path of the collection, here and in the functions below.

    Raises:
        CollectiveError: other ranks did not call this within the time-out of their group.
    """
    tables = _tables(model)
    with all_ranks("table_statistics()", tables.values()):
        return _statistics(tables)


def _statistics(tables: Mapping[str, DynamicTable]) -> dict[str, TableStatistics]:
    result: dict[str, TableStatistics] = {}
    reduced: Optional[dist.ProcessGroup] = None
    for name, table in tables.items():
        group, process_group = table.group, table.process_group
        counters, size = group.counters()[table.index], group.storage.geometries[table.index]
        sizes = [counters.size, size.max_slots, size.slots]
        events = [counters.hits, counters.misses, counters.evicted, counters.refused]
        numbers = torch.tensor(sizes + events, device=group.device)
        if process_group is not None and process_group.size() > 1:
            dist.all_reduce(numbers, group=process_group)
            reduced = process_group
        rows, capacity, slots, hits, misses, evicted, refused = numbers.tolist()
        result[name] = TableStatistics(rows, capacity, slots, rows / capacity, hits, misses, evicted, refused)
    let_go(reduced)
    return result


def set_score(model: nn.Module, score: Union[int, Mapping[str, int]]) -> None:
    """Sets the score that keys touched or inserted from now on get, in tables with strategy CUSTOMIZED.

    Args:
        model: the sharded model; every rank gives the same scores.
        score: a signed 64-bit number for all such tables, or one by table name.

    Raises:
        ConfigError: a name that is no table with strategy CUSTOMIZED, or a number beyond 64 bits. Nothing is changed.
    """
    customized = {
        name: table
        for name, table in _tables(model).items()
        if table.group.evict_strategy is DynamicEmbEvictStrategy.CUSTOMIZED
    }
    by_name = dict(score) if isinstance(score, Mapping) else dict.fromkeys(customized, score)
    for name, number in by_name.items():
        if name not in customized:
            raise ConfigError(
                f"table '{name}' has no customized score; tables that have: {', '.join(customized) or 'none'}"
            )
        if not -(2**63) <= number < 2**63:
            raise ConfigError(f"table '{name}': score {number} does not fit in a signed 64-bit integer")
    for name, number in by_name.items():
        table = customized[name]
        # Not an assignment: that would copy from the host, and wait for the device.
        table.group.custom_scores[table.index].fill_(number)


def get_score(model: nn.Module) -> dict[str, int]:
    """The score that touched keys get now, by table: the clock (LRU) or the number last given (CUSTOMIZED).

    Tables with strategy LFU have no such number and are left out. Waits for the device.
    """
    result = {}
    for name, table in _tables(model).items():
        strategy = table.group.evict_strategy
        if strategy is DynamicEmbEvictStrategy.LRU:
            result[name] = int(table.group.clock[table.index])
        elif strategy is DynamicEmbEvictStrategy.CUSTOMIZED:
            result[name] = int(table.group.custom_scores[table.index])
    return result
