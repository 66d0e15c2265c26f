"""Light views that kernels take: tensors and plain numbers, no behaviour. The owners are in :mod:`dynamicemb.table`."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

import torch

from dynamicemb.kernels.layout import RowLayout

__all__ = [
    "AddressRow", "EvictionView", "GeometryColumn", "GroupView", "InitializerView", "KeyBatch", "KeyStatus",
    "ScoreSource", "Scores", "TouchView", "UniqueKeys",
]  # fmt: skip


class AddressRow(enum.IntEnum):
    """Rows of :attr:`GroupView.addresses`."""

    DIGESTS = 0
    KEYS = 1
    SCORES = 2
    ROWS = 3


class GeometryColumn(enum.IntEnum):
    """Columns of :attr:`GroupView.geometry`; see :class:`~dynamicemb.kernels.layout.TableGeometry`."""

    MAX_BUCKETS = 0
    SHIFT = 1
    LEVELS = 2


class KeyStatus(enum.IntEnum):
    """What :func:`~dynamicemb.kernels.insert.insert` did with a key."""

    #: The key was there already.
    FOUND = 0
    #: It took an empty slot.
    INSERTED = 1
    #: It took the slot of the key that was evicted for it.
    REPLACED = 2
    #: Every slot of its bucket belongs to a key of the same batch.
    REFUSED = 3


@dataclass(frozen=True)
class GroupView:
    """The state of a group of ``T`` tables that share a row layout and a bucket capacity.

    Attributes:
        addresses: int64 [4, T * MAX_CHUNKS], base address of each chunk's digests (uint8 [slots]), keys (int64
            [slots]), scores (int64 [slots]) and rows (uint8 [slots, row_bytes]); 0 where there is no chunk.
        geometry: int64 [T, 3], see :class:`GeometryColumn`.
        bucket_capacity: slots of a bucket, a power of two from 8 to 256.
        world_size: ranks that share the tables.
        layout: bytes of a row.
    """

    addresses: torch.Tensor
    geometry: torch.Tensor
    bucket_capacity: int
    world_size: int
    layout: RowLayout

    @property
    def device(self) -> torch.device:
        return self.addresses.device


@dataclass(frozen=True)
class KeyBatch:
    """A batch of keys as they came, equal ones among them.

    Attributes:
        keys: int64 [N].
        tables: int32 [N], index of each key's table in the group.
    """

    keys: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True)
class UniqueKeys:
    """A batch of ``N`` keys, each distinct (table, key) once, in ascending (owner, table, mixed key).

    Only the first ``count`` of the ``U`` entries are valid. The CPU engine returns ``U == count``; the Triton engine
    returns ``U == N``, so that nothing waits for the device. Past ``count``, ``tables`` is 0 and ``offsets`` is N, so
    that they can be used as indices; ``keys`` is undefined.

    Attributes:
        keys: int64 [U].
        tables: int32 [U], index of the key's table in the group.
        inverse: int64 [N], entry of each key of the batch.
        order: int64 [N], positions in the batch sorted by entry, equal ones in batch order.
        offsets: int64 [U + 1], where each entry's positions begin in ``order``.
        count: int64 [1], number of valid entries, on the device.
    """

    keys: torch.Tensor
    tables: torch.Tensor
    inverse: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor
    count: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The attributes in their order, from which ``UniqueKeys(*tensors)`` is made again."""
        return self.keys, self.tables, self.inverse, self.order, self.offsets, self.count

    def narrowed(self, count: int) -> UniqueKeys:
        """The valid entries alone, once the host knows their number."""
        return dataclasses.replace(
            self, keys=self.keys[:count], tables=self.tables[:count], offsets=self.offsets[: count + 1]
        )


@dataclass(frozen=True)
class EvictionView:
    """The last evictions of a group, in a ring of ``R`` entries: number ``n``, counted from 0, is entry ``n mod R``.

    Attributes:
        tick: int64 [1], the time: training lookups that were noted, and one.
        count: int64 [1], evictions that were noted.
        keys: int64 [R].
        tables: int32 [R].
        ticks: int32 [R].
    """

    tick: torch.Tensor
    count: torch.Tensor
    keys: torch.Tensor
    tables: torch.Tensor
    ticks: torch.Tensor


@dataclass(frozen=True)
class TouchView:
    """When each slot of a group was touched last.

    Attributes:
        ticks: int32, one for each slot.
        bases: int64 [T * MAX_CHUNKS], where those of each chunk begin.
    """

    ticks: torch.Tensor
    bases: torch.Tensor


class ScoreSource(enum.IntEnum):
    """Which of :attr:`Scores.numbers` make the score of an entry of a batch."""

    #: ``numbers[entry]``
    ENTRY = 0
    #: ``numbers[entry + 1] - numbers[entry]``
    DIFFERENCE = 1
    #: ``numbers[table]``, of the entry's table
    TABLE = 2
    #: ``numbers[table] + 1``
    NEXT = 3


@dataclass(frozen=True)
class Scores:
    """The score of each entry of a batch, read where it is, so that no kernel has to write it out for each entry.

    Attributes:
        numbers: int64, as long as ``source`` needs it: [U], [U + 1] or [T].
        source: how a score follows from them.
    """

    numbers: torch.Tensor
    source: ScoreSource = ScoreSource.ENTRY


@dataclass(frozen=True)
class InitializerView:
    """How new rows of each of ``T`` tables begin.

    Attributes:
        seeds: int64 [T], Philox key: 64 bits derived from (seed, table name).
        modes: int32 [T], see :class:`~dynamicemb.kernels.fill.FillMode`.
        parameters: float64 [T, 4], meaning by mode, see :class:`~dynamicemb.kernels.fill.FillMode`.
        states: float32 [T], first value of every optimizer state.
        any_normal: whether a table's mode is NORMAL or TRUNCATED_NORMAL, which the host has to know: kernels for groups
            without such a table are compiled without the quantile, and hold more than twice as many warps.
    """

    seeds: torch.Tensor
    modes: torch.Tensor
    parameters: torch.Tensor
    states: torch.Tensor
    any_normal: bool
