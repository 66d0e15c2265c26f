"""What a state dict says of a dynamic table, checked by one rank on its own; nothing is changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dynamicemb.errors import CheckpointError
from dynamicemb.kernels.hashing import mix64, owners, sortable
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.shard.state_dict import (
    CONFIG,
    CONFIG_ENTRY,
    DTYPE_CODES,
    EVICT_STRATEGY_CODES,
    HYPERPARAMETERS_ENTRY,
    KEYS,
    OPTIMIZER_CODES,
    OPTIMIZER_PREFIX,
    PROGRESS,
    PROGRESS_ENTRY,
    SCORES,
    SLOTS,
    WEIGHT,
    TableSlot,
    row_entries,
)
from dynamicemb.table.compatibility import SavedTable, check_fit, dtype_name
from dynamicemb.table.optimizers import HYPERPARAMETERS

__all__ = ["REMEDY", "CheckedTable", "checked_table", "saved_table"]

#: What to do if rows are not where they belong.
REMEDY = (
    "each rank must have its own rows; dynamicemb.checkpoint.dcp.load reads a checkpoint so, at any number of ranks"
)
_ROWS_ALONE = f"leave '{OPTIMIZER_PREFIX}*' and '{HYPERPARAMETERS_ENTRY}' out and load it with strict=False"


@dataclass(frozen=True)
class CheckedTable:
    """The state of one table, found good. What the state dict does not have is None, or no row entry.

    Attributes:
        rows: by entry, this rank's.
        total_rows: of all ranks, as the state dict says.
        progress, hyperparameters, slots: as lists.
        says_config: whether eviction strategy and optimizer are those that the rows were saved with; False: the state
            dict does not say.
        fresh: entries that begin anew: those that are missing, and those that are of no use without them.
    """

    table: TableSlot
    rows: dict[str, torch.Tensor]
    total_rows: int
    progress: Optional[list[int]]
    hyperparameters: Optional[list[float]]
    slots: Optional[list[int]]
    says_config: bool
    fresh: tuple[str, ...]

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer goes on where it was."""
        return not any(name.startswith(OPTIMIZER_PREFIX) for name in self.fresh)

    @property
    def facts(self) -> tuple[Any, ...]:
        """What is the same on every rank if all of them load the same state dict."""
        numbers = self.total_rows, self.progress, self.hyperparameters, self.slots
        return *numbers, self.says_config, sorted(self.rows), self.fresh


def checked_table(table: TableSlot, state: Mapping[str, Any], pg: Optional[dist.ProcessGroup]) -> CheckedTable:
    """Checks what can be checked without other ranks.

    Args:
        table: the model's.
        state: entries by name, not empty; also ``optimizer.*`` of states that the table does not have.
        pg: the ranks that share the table.

    Raises:
        CheckpointError: an entry is not what it should be, there are keys without rows or rows without keys, the rows
            cannot be rows of the table, or they are not this rank's.
    """
    where = f"state dict of table '{table.name}'"
    for name, other in ((KEYS, WEIGHT), (WEIGHT, KEYS)):
        if name not in state:
            raise CheckpointError(
                f"{where}: it has {', '.join(map(repr, sorted(state)))}, but no '{name}'; '{name}' and '{other}' are "
                "the rows, and belong together: add what is missing, or leave out all entries of the table"
            )
    local = {name: _local_rows(f"{where}, entry '{name}'", state[name]) for name in state if _is_of_rows(name)}
    shapes = {name: tuple(values.shape[1:]) for name, (values, _) in local.items()}
    shapes |= {name: () for name in state if name not in shapes}
    saved = saved_table(where, table, state.get(CONFIG_ENTRY), shapes, local[WEIGHT][0].dtype)
    config = table.group.configs[table.index]
    check_fit(where, saved, config, without_optimizer=_ROWS_ALONE)
    rows = _checked_rows(table, where, local)
    first, stop = _own_range(where, rows[KEYS], local[KEYS][1], pg)
    progress, hyperparameters, slots = _checked_numbers(where, state)
    if saved.evict_strategy is None and config.evict_strategy is DynamicEmbEvictStrategy.LRU and progress is not None:
        _check_clock(where, rows.get(SCORES), progress)
    fresh = _fresh(table, state)
    return CheckedTable(
        table,
        {name: values[first:stop] for name, values in rows.items() if name not in fresh},
        local[KEYS][1].size[0],
        progress,
        hyperparameters,
        slots,
        saved.evict_strategy is not None,
        fresh,
    )


def _is_of_rows(name: str) -> bool:
    return name in (KEYS, SCORES, WEIGHT) or name.startswith(OPTIMIZER_PREFIX)


def _fresh(table: TableSlot, state: Mapping[str, Any]) -> tuple[str, ...]:
    """What begins anew: an optimizer goes on with all of its states, or with none."""
    names = [entry.name for entry in row_entries(table.layout)]
    states = [name for name in names if name.startswith(OPTIMIZER_PREFIX)]
    if all(name in state for name in states):
        states = []
    others = [name for name in (SCORES, PROGRESS_ENTRY, HYPERPARAMETERS_ENTRY, SLOTS) if name not in state]
    return (*states, *others)


# ---------------------------------------------------------------------------------------------------- fit


def _config(where: str, value: Any) -> SavedTable:
    """What an entry ``config`` says; see :data:`~dynamicemb.shard.state_dict.CONFIG`.

    Raises:
        CheckpointError: it is no such entry, or of a later version.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (len(CONFIG),):
        raise CheckpointError(f"{where}, entry '{CONFIG_ENTRY}': {_shown(value)}, expected torch.int64 {[len(CONFIG)]}")
    strategies = {code: strategy.value for strategy, code in EVICT_STRATEGY_CODES.items()}
    optimizers = {code: kind.name.lower() for kind, code in OPTIMIZER_CODES.items()}
    dtypes = {code: dtype_name(dtype) for dtype, code in DTYPE_CODES.items()}
    strategy, optimizer, dtype = value.tolist()
    if strategy not in strategies or optimizer not in optimizers or dtype not in dtypes:
        raise CheckpointError(
            f"{where}, entry '{CONFIG_ENTRY}': {value.tolist()} means nothing to this version; it is damaged, or of a "
            "later version: update dynamicemb"
        )
    return SavedTable(evict_strategy=strategies[strategy], optimizer=optimizers[optimizer], dtype=dtypes[dtype])


def saved_table(
    where: str,
    table: TableSlot,
    config: Any,
    row_shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> SavedTable:
    """What a state dict or a checkpoint says of a table whose rows it has.

    Args:
        where: for messages.
        table: the model's.
        config: the entry of that name; None: there is none.
        row_shapes: shape of a row by name of the entry, of all entries.
        dtype: of the rows.
    """
    states = {name.removeprefix(OPTIMIZER_PREFIX): shape for name, shape in row_shapes.items()
              if name.startswith(OPTIMIZER_PREFIX)}  # fmt: skip
    shape = row_shapes[WEIGHT]
    dim = shape[0] if len(shape) == 1 else None
    if config is not None:
        saved = dataclasses.replace(_config(where, config), dim=dim)
        left_out = not states and HYPERPARAMETERS_ENTRY not in row_shapes
        return dataclasses.replace(saved, optimizer=None) if left_out else saved
    saved = SavedTable(dim=dim, dtype=dtype_name(dtype))
    if states.items() <= {(one.name, (one.width,)) for one in table.layout.states}:
        return saved
    return dataclasses.replace(saved, states={name: math.prod(shape) for name, shape in states.items()})


def _check_clock(where: str, scores: Optional[torch.Tensor], progress: list[int]) -> None:
    """Without ``config``: scores that are later than the clock are none of LRU."""
    clock = progress[PROGRESS.index("clock")]
    if scores is not None and scores.numel() and int(scores.max()) > clock:
        raise CheckpointError(
            f"{where} has scores up to {int(scores.max())} at step {clock}, so its evict_strategy is not lru, as the "
            "model's is; give the model the strategy that it was saved with"
        )


# ---------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Ranges:
    """Which rows of a tensor of shape ``size`` are here: (first, rows) of each shard; None: all of them."""

    size: torch.Size
    places: Optional[list[tuple[int, int]]]


_Local = tuple[torch.Tensor, _Ranges]


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def _local_rows(where: str, value: Any) -> _Local:
    """The rows that are here, [n, ...] in host memory, in ascending order of their place."""
    if isinstance(value, ShardedTensor):
        size, dtype = value.metadata().size, value.metadata().tensor_properties.dtype
        shards = sorted(value.local_shards(), key=lambda shard: shard.metadata.shard_offsets)
        places = [(shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]) for shard in shards]
        if any(list(shard.metadata.shard_sizes[1:]) != list(size[1:]) for shard in shards):
            raise CheckpointError(f"{where}: its columns are divided among shards; a shard must have whole rows")
        pieces = [shard.tensor.detach().cpu() for shard in shards]
        empty = torch.empty(0, *size[1:], dtype=dtype)
        return (pieces[0] if len(pieces) == 1 else torch.cat([empty, *pieces])), _Ranges(size, places)
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.dim() > 0:
        return value.detach().cpu(), _Ranges(value.shape, None)
    raise CheckpointError(f"{where}: {_shown(value)}, expected rows as a tensor or a ShardedTensor")


def _checked_rows(table: TableSlot, where: str, local: Mapping[str, _Local]) -> dict[str, torch.Tensor]:
    rows = {}
    for entry in row_entries(table.layout):
        if entry.name not in local:
            continue
        (values, ranges), own = local[entry.name], f"{where}, entry '{entry.name}'"
        shape = (*ranges.size[1:],)
        if values.dtype != entry.dtype or shape != entry.row_shape:
            raise CheckpointError(
                f"{own}: rows of shape {list(shape)} and {values.dtype}; the model's table has "
                f"{list(entry.row_shape)} and {entry.dtype}: the state dict is damaged"
            )
        keys = local[KEYS][1]
        if ranges.places != keys.places or ranges.size[0] != keys.size[0]:
            raise CheckpointError(f"{own}: other rows than those of 'keys'; all entries must be of one state dict")
        rows[entry.name] = values
    return rows


def _own_range(table: str, keys: torch.Tensor, ranges: _Ranges, pg: Optional[dist.ProcessGroup]) -> tuple[int, int]:
    """Where this rank's rows are among those that are here, after a look at the order of all of these."""
    where = f"{table}, entry 'keys'"
    mixed = sortable(mix64(keys))
    if (wrong := (mixed[1:] <= mixed[:-1]).nonzero()).numel():
        place = int(wrong[0])
        one, other = keys[place : place + 2].tolist()
        what = "twice" if one == other else f"before key {other}, which precedes it in the order of mixed keys"
        raise CheckpointError(f"{where}: row {place} of this rank has key {one} {what}; each key must be there once")
    rank, size = (0, 1) if pg is None else (pg.rank(), pg.size())
    owner = owners(keys, size)
    if ranges.places is None:
        first, stop = torch.searchsorted(owner, torch.tensor([rank, rank + 1])).tolist()
        return first, stop
    if (foreign := (owner != rank).nonzero()).numel():
        place = int(foreign[0])
        raise CheckpointError(
            f"{where}: key {int(keys[place])} belongs to rank {int(owner[place])} of {size}, but is on rank {rank}: "
            f"{REMEDY}"
        )
    return 0, keys.numel()


# ---------------------------------------------------------------------------------------------------- numbers


def _checked_numbers(
    where: str, state: Mapping[str, Any]
) -> tuple[Optional[list[int]], Optional[list[float]], Optional[list[int]]]:
    progress = _numbers(where, PROGRESS_ENTRY, state, torch.int64, len(PROGRESS))
    hyperparameters = _numbers(where, HYPERPARAMETERS_ENTRY, state, torch.float64, len(HYPERPARAMETERS))
    slots = _numbers(where, SLOTS, state, torch.int64, None)
    by_name = dict(zip(PROGRESS, progress or (), strict=False))
    negative = [name for name, number in by_name.items() if number < 0 and name != "custom_score"]
    if negative or min(slots or [0]) < 0 or not all(map(math.isfinite, hyperparameters or ())):
        raise CheckpointError(
            f"{where}: numbers that no training gives: {by_name}, slots {slots}, hyperparameters {hyperparameters}; "
            "the state dict is damaged"
        )
    return progress, hyperparameters, slots


def _numbers(
    where: str, name: str, state: Mapping[str, Any], dtype: torch.dtype, length: Optional[int]
) -> Optional[list[Any]]:
    if name not in state:
        return None
    value = state[name]
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() != 1 or not len(value):
        raise CheckpointError(f"{where}, entry '{name}': {_shown(value)}, expected {dtype} [n]")
    if length is not None and len(value) != length:
        raise CheckpointError(f"{where}, entry '{name}': {len(value)} numbers, expected {length}")
    return value.tolist()
