"""Which keys of a step go where: shared by the input distribution, the lookup and the output distribution."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.streamable import Multistreamable

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["DynamicShardingContext", "GroupKeys", "OwnedKeys", "Route", "keys_by_group"]


@dataclass
class Route(Multistreamable):
    """How one batch of this rank travels; completed when the sizes have been exchanged.

    Attributes:
        unique: this rank's distinct keys, in the order in which they are sent; None on a single rank, where nothing
            travels.
        send_counts: keys sent to each rank.
        receive_counts: keys received from each rank.
    """

    unique: Optional[UniqueKeys] = None
    send_counts: list[int] = field(default_factory=list)
    receive_counts: list[int] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        if self.unique is not None:
            for tensor in self.unique.tensors():
                _record(tensor, stream)


@dataclass(frozen=True)
class GroupKeys:
    """Keys of one group of tables: by sender, and by table from each sender.

    Attributes:
        keys: int64 [N].
        tables: int32 [N], index of each key's table in the group.
        occurrences: int64 [N], how often the sender met the key; None where every entry counts once.
        lengths_by_table: entries of each table from each sender, ``lengths_by_table[sender][table]``; they add up to N.
        unique: each key once; None where that is left to the lookup, which in evaluation does without.
    """

    keys: torch.Tensor
    tables: torch.Tensor
    occurrences: Optional[torch.Tensor]
    lengths_by_table: list[list[int]]
    unique: Optional[UniqueKeys] = None

    def deduplicated(self, world_size: int) -> GroupKeys:
        """With each key once. Does not synchronise."""
        num_tables = len(self.lengths_by_table[0])
        unique = dedup(self.keys, self.tables, num_tables, world_size, self.lengths_by_table)
        return dataclasses.replace(self, unique=unique)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.keys, self.tables)
        if self.occurrences is not None:
            yield self.occurrences
        if self.unique is not None:
            yield from self.unique.tensors()


def keys_by_group(keys: GroupKeys, tables_by_group: list[int]) -> list[GroupKeys]:
    """Keys of all tables of a sharding, whose indices count from 0 in each group, to those of each group.

    Args:
        keys: with the lengths of all tables.
        tables_by_group: number of tables of each group; tables are in the order of their groups.
    """
    if len(tables_by_group) == 1:
        return [keys]
    bounds = list(itertools.accumulate(tables_by_group, initial=0))
    # Each sender's keys are in the order of the tables, so a group's keys are one range from each sender.
    lengths = [[row[first:last] for first, last in itertools.pairwise(bounds)] for row in keys.lengths_by_table]
    sizes = [sum(part) for row in lengths for part in row]

    def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
        parts, groups = tensor.split(sizes), len(tables_by_group)
        return [_joined(parts[group::groups]) for group in range(groups)]

    columns = parts_of(keys.keys), parts_of(keys.tables)
    occurrences = [None] * len(tables_by_group) if keys.occurrences is None else parts_of(keys.occurrences)
    return list(map(GroupKeys, *columns, occurrences, map(list, zip(*lengths, strict=True))))


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # torch copies a single one, too


@dataclass
class OwnedKeys(Multistreamable):
    """The keys that this rank owns.

    torchrec keeps it in the list in which it keeps the ``KeyedJaggedTensor`` of other shardings, and asks it for
    :meth:`lengths`, :meth:`stride` and :meth:`variable_stride_per_key`.

    Attributes:
        groups: those of each group of tables.
        takes_gradients: whether the ranks exchange gradients of this batch, because a table takes updates on any of
            them; None on a single rank, where nothing is to be agreed on.
    """

    groups: list[GroupKeys]
    takes_gradients: Optional[bool] = None

    def lengths(self) -> torch.Tensor:
        """None at all: torchrec notes them for its own output distributions, which have no part in this."""
        return self.groups[0].keys.new_empty(0)

    def stride(self) -> int:
        return 1

    def variable_stride_per_key(self) -> bool:
        return False

    def record_stream(self, stream: torch.Stream) -> None:
        for group in self.groups:
            for tensor in group.tensors():
                _record(tensor, stream)


class DynamicShardingContext(SequenceShardingContext):
    """torchrec's context of a sequence sharding, with the route of the batch.

    Args:
        route: of the batch.
        fields: torchrec's.
    """

    # No dataclass, because torchrec's own is none before 1.7.
    def __init__(self, route: Optional[Route] = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.route = route

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        if self.route is not None:
            self.route.record_stream(stream)


def _record(tensor: torch.Tensor, stream: torch.Stream) -> None:
    if tensor.is_cuda:
        tensor.record_stream(stream)
