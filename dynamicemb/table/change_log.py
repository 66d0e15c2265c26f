"""Where changes of a group of tables are noted, on the device: evicted keys in a ring, touches by slot.

Times are ticks, see :mod:`dynamicemb.table.changes`; they are kept in 32 bits, for two thousand million lookups.
"""

from __future__ import annotations

import torch

from dynamicemb.kernels.layout import MAX_CHUNKS, TableGeometry
from dynamicemb.kernels.views import EvictionView, TouchView
from dynamicemb.table.storage import GroupStorage, state_memory

__all__ = ["EvictionLog", "TouchLog"]

#: Evicted keys that a group remembers at most and at least, 16 bytes each: 128 MiB and 1 MiB.
MAX_REMEMBERED, MIN_REMEMBERED = 1 << 23, 1 << 16


class EvictionLog:
    """The last evictions of a group, in a ring: the oldest give way.

    Args:
        slots: of all tables at full size; a quarter of them can be remembered, within limits.
    """

    @state_memory()
    def __init__(self, slots: int, device: torch.device) -> None:
        self.size = min(max(slots // 4, MIN_REMEMBERED), MAX_REMEMBERED)
        self._keys = torch.empty(self.size, dtype=torch.int64, device=device)
        self._tables = torch.empty(self.size, dtype=torch.int32, device=device)
        self._ticks = torch.empty(self.size, dtype=torch.int32, device=device)
        #: int64 [1]: the time, and the evictions so far.
        self.ticks = torch.ones(1, dtype=torch.int64, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        #: For the kernels.
        self.view = EvictionView(self.ticks, self._count, self._keys, self._tables, self._ticks)

    def lost_until(self) -> int:
        """All evictions after this tick are here; 0: all that there were."""
        count = int(self._count)
        return 0 if count <= self.size else int(self._ticks[count % self.size])

    def keys_after(self, table: int, tick: int) -> torch.Tensor:
        """Keys of ``table`` evicted after ``tick``, int64 [n], in any order. Waits for the device."""
        here = slice(0, min(int(self._count), self.size))
        return self._keys[here][(self._tables[here] == table) & (self._ticks[here] > tick)]


class TouchLog:
    """The tick of each slot's last touch: one run of numbers for each table, chunk after chunk, of its full size.

    Memory never moves, so that graphs of a step stay good.
    """

    @state_memory()
    def __init__(self, storage: GroupStorage) -> None:
        self._storage = storage
        self._first = [0]
        for size in storage.geometries:
            self._first.append(self._first[-1] + size.max_slots)
        # 0 is before all ticks.
        self._ticks = torch.zeros(self._first[-1], dtype=torch.int32, device=storage.device)
        self._bases = torch.zeros(len(storage.geometries) * MAX_CHUNKS, dtype=torch.int64, device=storage.device)
        #: For the kernels.
        self.view = TouchView(self._ticks, self._bases)
        for table in range(len(storage.geometries)):
            self._store_bases(table)

    def _chunk_bases(self, table: int) -> list[int]:
        bases = [self._first[table]]
        for chunk in self._storage.chunks[table]:
            bases.append(bases[-1] + chunk.digests.numel())
        return bases

    def _store_bases(self, table: int) -> None:
        bases = self._chunk_bases(table)[:-1]
        self._bases[table * MAX_CHUNKS :][: len(bases)] = torch.tensor(bases, device=self._bases.device)

    def of(self, table: int, chunk: int, place: slice) -> torch.Tensor:
        """int32 [slots] of a range of a chunk's slots."""
        base = self._chunk_bases(table)[chunk]
        return self._ticks[base + place.start : base + place.stop]

    def clear(self, table: int) -> None:
        self._ticks[self._first[table] : self._first[table + 1]] = 0
        self._store_bases(table)

    def grow(self, table: int, before: TableGeometry) -> None:
        """Gives the new chunk, bucket ``b`` of which was split off bucket ``b``, the ticks of that one: those of slots
        that are empty now do no harm."""
        self._store_bases(table)
        bases, capacity = self._chunk_bases(table), before.bucket_capacity
        new = self._ticks[bases[before.levels + 1] : bases[before.levels + 2]].view(-1, capacity)
        for chunk in range(before.levels + 1):
            # Chunk 0 has the multiples of 2**levels; the others the odd multiples of 2**zeros.
            zeros = before.levels - chunk
            first, stride = (0, 1 << before.levels) if chunk == 0 else (1 << zeros, 2 << zeros)
            # In place, since there may be no room for a copy. The last doubling may add fewer buckets than there are.
            split = new[first::stride]
            split.copy_(self._ticks[bases[chunk] : bases[chunk + 1]].view(-1, capacity)[: len(split)])
