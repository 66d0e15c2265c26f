"""Dynamic tables in ``model.state_dict()``: what entries there are, and their values.

A table ``item`` of a collection has, after ``<path of the collection>.embeddings.item.``,

* ``keys`` int64 [N], ``scores`` int64 [N], ``weight`` [N, dim] in the table's dtype and, for each state of its
  optimizer, ``optimizer.<state>`` float32 [N, width]: N rows in ascending order of the mixed key as an unsigned number,
  of which each rank holds the range that it owns;
* ``progress`` int64 [6] (:data:`PROGRESS`), ``hyperparameters`` float64 [6]
  (:data:`~dynamicemb.table.optimizers.HYPERPARAMETERS`), ``slots`` int64 [ranks] and ``config`` int64 [3]
  (:data:`CONFIG`), the same on every rank. Earlier state dicts have no ``config``.

Nothing of this depends on how tables are grouped or planned. Rows are copies in host memory, so training may go on.
Optimizer state of rows is here, and so are learning rates; ``fused_optimizer.state_dict()`` has nothing of them.

Ranks tell each other how many rows they have: all ranks that share a table must call ``state_dict()`` together, as they
must ``load_state_dict()``. ``get_model_state_dict`` of torch works with the module inside ``DistributedModelParallel``,
but its option ``full_state_dict`` does not: it cannot gather shards of unequal size.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Optional

import torch
import torch.distributed as dist
from torch import nn

from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.shard.lookup import DynamicLookup, GroupModule
from dynamicemb.shard.sharded_rows import sharded_rows
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import HYPERPARAMETERS

__all__ = [
    "CONFIG",
    "CONFIG_ENTRY",
    "DTYPE_CODES",
    "EVICT_STRATEGY_CODES",
    "HYPERPARAMETERS_ENTRY",
    "KEYS",
    "OPTIMIZER_CODES",
    "OPTIMIZER_PREFIX",
    "PROGRESS",
    "PROGRESS_ENTRY",
    "SCORES",
    "SLOTS",
    "WEIGHT",
    "EntryDescription",
    "RowEntry",
    "TableSlot",
    "described_entries",
    "dynamic_into_static",
    "entry_names",
    "is_dynamic",
    "name_entries",
    "row_entries",
    "state_entry",
    "table_slots",
    "table_states",
]

KEYS, SCORES, WEIGHT, SLOTS = "keys", "scores", "weight", "slots"
PROGRESS_ENTRY, HYPERPARAMETERS_ENTRY, CONFIG_ENTRY = "progress", "hyperparameters", "config"
_OPTIMIZER = "optimizer"
#: What the names of entries with optimizer state begin with.
OPTIMIZER_PREFIX = f"{_OPTIMIZER}."
#: What the numbers of ``progress`` are. Events are added up over all ranks.
PROGRESS = ("clock", "steps", "custom_score", "hits", "evicted", "refused")
#: What the numbers of ``config`` are: codes of what the rows cannot go on without.
CONFIG = ("evict_strategy", "optimizer", "dtype")
#: The codes: part of the format of state dicts, so they never change.
EVICT_STRATEGY_CODES = {
    DynamicEmbEvictStrategy.LRU: 0, DynamicEmbEvictStrategy.LFU: 1, DynamicEmbEvictStrategy.CUSTOMIZED: 2,
}  # fmt: skip
OPTIMIZER_CODES = {
    OptimizerKind.SGD: 0, OptimizerKind.ADAGRAD: 1, OptimizerKind.ROWWISE_ADAGRAD: 2, OptimizerKind.ADAM: 3,
}  # fmt: skip
#: ``torch.distributed.checkpoint`` converts rows without a word where dtypes differ, so they are told as well.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Rows that are copied to host memory at a time.
_PIECE_ROWS = 1 << 16


@dataclass(frozen=True)
class RowEntry:
    """An entry that has a value for each row: ``[N, *row_shape]`` of ``dtype``."""

    name: str
    dtype: torch.dtype
    row_shape: tuple[int, ...]

    def empty(self, rows: int) -> torch.Tensor:
        """Values of ``rows`` rows in host memory, undefined."""
        return torch.empty(rows, *self.row_shape, dtype=self.dtype)


@dataclass(frozen=True)
class TableSlot:
    """A table of a lookup: the module of its group, and its place there."""

    name: str
    module: GroupModule
    index: int

    @property
    def group(self) -> TableGroup:
        return self.module.group

    @property
    def layout(self) -> RowLayout:
        return self.group.storage.layout


@dataclass(frozen=True)
class EntryDescription:
    """Stands for an entry in a state dict without rows, see :func:`described_entries`."""

    table: TableSlot
    process_group: Optional[dist.ProcessGroup]
    name: str


def table_slots(lookup: DynamicLookup) -> list[TableSlot]:
    """The tables of ``lookup``, in the same order on every rank."""
    slots = []
    for module in lookup.group_modules:
        assert isinstance(module, GroupModule)
        slots += [TableSlot(config.name, module, index) for index, config in enumerate(module.group.configs)]
    return slots


def state_entry(state: str) -> str:
    """The entry that holds an optimizer state."""
    return f"{OPTIMIZER_PREFIX}{state}"


def row_entries(layout: RowLayout) -> tuple[RowEntry, ...]:
    """The entries of a table that have a value for each row."""
    states = (RowEntry(state_entry(state.name), torch.float32, (state.width,)) for state in layout.states)
    return (
        RowEntry(KEYS, torch.int64, ()),
        RowEntry(SCORES, torch.int64, ()),
        RowEntry(WEIGHT, layout.embedding_dtype, (layout.dim,)),
        *states,
    )


def entry_names(layout: RowLayout) -> tuple[str, ...]:
    """All entries of a table."""
    return (*(entry.name for entry in row_entries(layout)), PROGRESS_ENTRY, HYPERPARAMETERS_ENTRY, SLOTS, CONFIG_ENTRY)


def is_dynamic(names: Container[str], start: str) -> bool:
    """Whether a state dict or a checkpoint has a dynamic table whose entries begin with ``start``."""
    return all(start + name in names for name in (WEIGHT, KEYS, PROGRESS_ENTRY))


def dynamic_into_static(where: str) -> str:
    """Why rows of a dynamic table are not loaded into a static one; ``where`` names place and table."""
    return (
        f"{where} has rows of a dynamic table, in the order of their hash, but the model's table is static, where row "
        "i is that of id i; load them into a model whose table has use_dynamicemb=True, and if it must be static, look "
        "ids up there and copy the rows (for the other way, there is dynamicemb.checkpoint.static.load_static)"
    )


def name_entries(module: nn.Module, layout: RowLayout) -> None:
    """Gives the module of a table an attribute for each entry: ``get_model_state_dict`` of torch looks them up."""
    for name in entry_names(layout):
        if "." not in name and name != WEIGHT:
            setattr(module, name, None)
    if layout.states:
        optimizer = SimpleNamespace(**dict.fromkeys(state.name for state in layout.states))
        setattr(module, _OPTIMIZER, optimizer)


def described_entries(lookup: DynamicLookup) -> dict[str, dict[str, EntryDescription]]:
    """The entries of every table by name, without values. Not collective."""
    return {
        table.name: {name: EntryDescription(table, lookup.process_group, name) for name in entry_names(table.layout)}
        for table in table_slots(lookup)
    }


def table_states(lookup: DynamicLookup) -> dict[str, dict[str, torch.Tensor]]:
    """The entries of every table by name. All ranks that share the tables call it together; waits for the device."""
    tables, pg = table_slots(lookup), lookup.process_group
    numbers = _gathered(torch.tensor([_numbers(table) for table in tables], device=tables[0].group.device), pg)
    return {table.name: _table_state(table, numbers[:, place].cpu(), pg) for place, table in enumerate(tables)}


def _numbers(table: TableSlot) -> list[int]:
    """What ranks must know of each other: rows, slots, hits, evicted, refused."""
    progress = table.group.progress(table.index)
    rows, slots = table.group.contents(table.index).count(), table.group.storage.geometries[table.index].slots
    return [rows, slots, progress.hits, progress.evicted, progress.refused]


def _gathered(values: torch.Tensor, pg: Optional[dist.ProcessGroup]) -> torch.Tensor:
    """``values`` of all ranks, [ranks, ...]."""
    if pg is None or pg.size() == 1:
        return values.unsqueeze(0)
    result = values.new_zeros(pg.size(), *values.shape)
    result[pg.rank()] = values
    dist.all_reduce(result, group=pg)
    return result


def _table_state(table: TableSlot, numbers: torch.Tensor, pg: Optional[dist.ProcessGroup]) -> dict[str, torch.Tensor]:
    counts, events = numbers[:, 0].tolist(), numbers[:, 2:].sum(0).tolist()
    progress = table.group.progress(table.index)
    rows = _host_rows(table, counts[0 if pg is None else pg.rank()])
    state = {name: sharded_rows(values, counts, pg) for name, values in rows.items()}
    state[PROGRESS_ENTRY] = torch.tensor([progress.clock, progress.steps, progress.custom_score, *events])
    state[HYPERPARAMETERS_ENTRY] = torch.tensor(progress.hyperparameters, dtype=torch.float64)
    assert len(state[HYPERPARAMETERS_ENTRY]) == len(HYPERPARAMETERS)
    state[SLOTS] = numbers[:, 1].clone()
    config = table.group.configs[table.index]
    codes = EVICT_STRATEGY_CODES[config.evict_strategy], OPTIMIZER_CODES[config.optimizer.kind]
    state[CONFIG_ENTRY] = torch.tensor([*codes, DTYPE_CODES[config.embedding_dtype]])
    return state


def _host_rows(table: TableSlot, count: int) -> dict[str, torch.Tensor]:
    """This rank's rows, by entry."""
    result = {entry.name: entry.empty(count) for entry in row_entries(table.layout)}
    contents = table.group.contents(table.index)
    position = 0
    for run in contents.runs(_PIECE_ROWS):
        rows = contents.read(run)
        place = slice(position, position + len(run))
        values = {KEYS: rows.keys, SCORES: rows.scores, WEIGHT: rows.embeddings}
        values |= {state_entry(name): state for name, state in rows.states.items()}
        for name, piece in values.items():
            result[name][place].copy_(piece)
        position += len(run)
    return result
