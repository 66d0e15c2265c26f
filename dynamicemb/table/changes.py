"""What has changed in a group of tables since a step: rows that were touched, keys that were evicted.

Nothing is kept until someone asks for it (:meth:`GroupChanges.begin`), so training without checkpoints pays nothing.
From then on a training lookup notes the keys that it evicted in a ring, and, unless scores tell (LRU), when each slot
was touched. All of it is on the device and of fixed size, written by one kernel for all tables; nothing in a step
waits.

Time is counted in **ticks**, training lookups of the group that were noted; tick 1 is before the first of them. A
table's own clock may be another, as loading sets it; ``_Start`` ties the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb.kernels.find import find
from dynamicemb.kernels.hashing import mix64, sortable
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.layout import NO_SLOT, TableGeometry
from dynamicemb.kernels.note import note, note_touches
from dynamicemb.kernels.views import EvictionView, KeyBatch, UniqueKeys
from dynamicemb.table.ancestor import Ancestor
from dynamicemb.table.capture import is_captured
from dynamicemb.table.change_log import EvictionLog, TouchLog
from dynamicemb.table.storage import GroupStorage

__all__ = ["GroupChanges", "Selection", "Survey"]

#: Slots that are surveyed together.
_SURVEYED_SLOTS = 1 << 20
#: Evicted keys are sorted in so many ranges of mixed keys, one after the other: memory for one of them.
_SORT_BITS = 4

#: Called with the number of a chunk and a range of its slots; returns bool [slots], meaningful where a key is.
Selection = Callable[[int, slice], torch.Tensor]


@dataclass(frozen=True)
class Survey:
    """A look at a whole table: its rows, those of them that are selected, and the sum of its mixed keys mod 2**64."""

    rows: int
    selected: int
    keys_sum: int


@dataclass(frozen=True)
class _Start:
    """Since when a table's changes are known: its clock then, and the tick."""

    clock: int
    tick: int


class GroupChanges:
    """The changes of one group.

    Args:
        storage: of the group.
        clock: the group's, int64 [T].
        by_score: a row's score is the clock of its last touch (LRU); otherwise touches are noted by slot, 4 bytes for
            each slot of the full size.
    """

    def __init__(self, storage: GroupStorage, clock: torch.Tensor, by_score: bool) -> None:
        self._storage, self._clock, self._by_score = storage, clock, by_score
        self._starts: list[Optional[_Start]] = [None] * len(storage.geometries)
        self._evictions: Optional[EvictionLog] = None
        self._touches: Optional[TouchLog] = None
        #: Training lookups that this process has made, noted or not.
        self.lookups = 0
        # As many of them had been made when the changes of a table began to be kept.
        self._lookups_before = 0
        #: By how many lookups an update came after its own, at most.
        self.lag = 0
        #: Checkpoints that each table has been written to or read from, oldest first; what was before a load is gone.
        self.checkpoints: list[tuple[Ancestor, ...]] = [()] * len(storage.geometries)

    # ------------------------------------------------------------------------------------------------ in a step

    def log(self) -> Optional[EvictionView]:
        """Where a training lookup is to be counted, for :func:`~dynamicemb.kernels.tally.tally`; None: nowhere."""
        if not self._noting():
            return None
        assert self._evictions is not None
        return self._evictions.view

    def looked_up(
        self, unique: UniqueKeys, slots: torch.Tensor, insertion: Insertion, evicted: Optional[torch.Tensor]
    ) -> None:
        """A training lookup has been made, and counted in :meth:`log`, if that is anywhere. Does not synchronise.

        Args:
            unique: the batch.
            slots: int64 [U], where the keys are, −1 for none.
            insertion: what became of them.
            evicted: what the tally returned.
        """
        self.lookups += 1
        if evicted is not None:
            assert self._evictions is not None
            touches = None if self._touches is None else self._touches.view
            note(unique, slots, insertion, evicted, self._evictions.view, touches)

    def updated(self, lookup: int, unique: UniqueKeys, slots: torch.Tensor) -> None:
        """Rows of training lookup number ``lookup`` have been updated. Does not synchronise.

        Args:
            lookup: what :attr:`lookups` was after it.
            unique: the batch.
            slots: int64 [U], where the rows are, −1 for none.
        """
        self.lag = max(self.lag, self.lookups - lookup)
        if self._by_score or (lookup == self.lookups and lookup > self._lookups_before):
            return  # noted by the lookup, since which no other has been made
        if self._noting():
            assert self._touches is not None and self._evictions is not None
            note_touches(unique, slots, self._evictions.ticks, self._touches.view)

    def _noting(self) -> bool:
        """Whether changes are to be noted; takes the memory on first use."""
        if self._evictions is None:
            if not any(self._starts):
                return False
            device = self._storage.device
            if is_captured(device):  # the graph would empty the memory with every replay; clocks will tell
                return False
            # Both or none, if there is no room.
            evictions = EvictionLog(sum(size.max_slots for size in self._storage.geometries), device)
            self._touches = None if self._by_score else TouchLog(self._storage)
            self._evictions = evictions
        return True

    def grown(self, table: int, before: TableGeometry) -> None:
        """A table has been doubled, from the size ``before``."""
        if self._touches is not None:
            self._touches.grow(table, before)

    # ------------------------------------------------------------------------------------------------ between steps

    @property
    def _tick(self) -> int:
        return 1 if self._evictions is None else int(self._evictions.ticks)

    def begin(self) -> None:
        """Keeps changes from now on, of every table whose changes are not known already. Waits for the device."""
        tick, clocks = self._tick, self._clock.tolist()
        for table, clock in enumerate(clocks):
            start = self._starts[table]
            if start is None or clock != start.clock + tick - start.tick:  # lookups that nobody noted have been made
                self._starts[table] = _Start(clock, tick)
                self._lookups_before = self.lookups

    def restart(self, table: int) -> None:
        """The contents and the clock of a table have been replaced: what changed before is forgotten."""
        clock = int(self._clock[table])
        self._starts[table] = _Start(clock, self._tick)
        self.checkpoints[table] = (Ancestor(clock, None),)
        self._lookups_before = self.lookups
        if self._touches is not None:
            self._touches.clear(table)

    def first_step(self, table: int) -> int:
        """The earliest clock since which all changes of a table are known; after :meth:`begin`. Waits."""
        start = self._starts[table]
        assert start is not None, "begin first"
        lost = 0 if self._evictions is None else self._evictions.lost_until()
        return start.clock + max(0, lost - start.tick)

    def _tick_at(self, table: int, clock: int) -> int:
        start = self._starts[table]
        assert start is not None and clock >= start.clock
        return start.tick + clock - start.clock

    def touched(self, table: int, since: int, lag: int) -> Selection:
        """Which slots have been touched since the table's clock was ``since``, at or after :meth:`first_step`, those of
        the lookup that made it ``since`` included: their update may have come later.

        Args:
            lag: the greatest :attr:`lag` of all ranks.
        """
        if self._by_score:
            chunks, least = self._storage.chunks[table], since - lag
            return lambda number, place: chunks[number].scores[place] >= least
        if self._touches is None:
            return lambda number, place: torch.zeros(
                place.stop - place.start, dtype=torch.bool, device=self._storage.device
            )
        touches, tick = self._touches, self._tick_at(table, since)
        return lambda number, place: touches.of(table, number, place) >= tick

    def survey(self, table: int, selected: Optional[Selection]) -> Survey:
        """Counts a table's rows. Reads 9 bytes of each slot, 17 (LRU) or 13 (otherwise) with ``selected``."""
        device = self._storage.device
        rows, some, keys_sum = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))
        for number, chunk in enumerate(self._storage.chunks[table]):
            slots = chunk.digests.numel()
            for first in range(0, slots, _SURVEYED_SLOTS):
                place = slice(first, min(first + _SURVEYED_SLOTS, slots))
                here = chunk.digests[place] != 0
                rows += here.count_nonzero()
                some += (here if selected is None else here & selected(number, place)).count_nonzero()
                keys_sum += torch.where(here, mix64(chunk.keys[place]), 0).sum()
        return Survey(int(rows), int(some), int(keys_sum) % 2**64)

    def evicted(self, table: int, since: int) -> torch.Tensor:
        """Keys that were evicted after the table's clock was ``since``, at or after :meth:`first_step`, and are not in
        it now: int64 [n] in host memory, distinct, in ascending order of the mixed key."""
        if self._evictions is None:
            return torch.empty(0, dtype=torch.int64)
        keys = self._evictions.keys_after(table, self._tick_at(table, since))
        high_bits = (mix64(keys) >> (64 - _SORT_BITS)) & ((1 << _SORT_BITS) - 1)
        parts = [self._absent(table, keys[high_bits == part]).cpu() for part in range(1 << _SORT_BITS)]
        return torch.cat(parts)

    def _absent(self, table: int, keys: torch.Tensor) -> torch.Tensor:
        """Those of ``keys`` that are not in the table, each once, in order."""
        if keys.numel() == 0:
            return keys
        keys = keys[torch.argsort(sortable(mix64(keys)))]
        distinct = torch.ones_like(keys, dtype=torch.bool)
        distinct[1:] = keys[1:] != keys[:-1]
        keys = keys[distinct]
        tables = torch.full(keys.shape, table, dtype=torch.int32, device=keys.device)
        return keys[find(self._storage.view, KeyBatch(keys, tables)) == NO_SLOT]
