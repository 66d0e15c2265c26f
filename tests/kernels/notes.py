"""What notes of changes must be, kept in lists and dictionaries, for the tests of both engines."""

from __future__ import annotations

import random

import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.insert import Insertion
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS
from dynamicemb.kernels.note import note, note_touches
from dynamicemb.kernels.tally import tally
from dynamicemb.kernels.views import EvictionView, KeyStatus, TouchView, UniqueKeys
from tests.kernels.paired import int32, int64

__all__ = ["Notes"]

TABLES, CHUNKS, SLOTS = 3, 2, 50
REPLACED, REFUSED = KeyStatus.REPLACED, KeyStatus.REFUSED


class Notes:
    """Three tables of two chunks whose lookups are made up at random, and what is known of them after each."""

    def __init__(self, seed: int, ring: int, touches: bool, device: str) -> None:
        self.random, self.ring, self.device = random.Random(seed), ring, device
        self.log = EvictionView(
            tick=int64([7], device),
            count=int64([0], device),
            keys=torch.full((ring,), -1, dtype=torch.int64, device=device),
            tables=torch.full((ring,), -1, dtype=torch.int32, device=device),
            ticks=torch.full((ring,), -1, dtype=torch.int32, device=device),
        )
        # Chunks in an order of their own.
        places = self.random.sample(range(TABLES * CHUNKS), TABLES * CHUNKS)
        self.bases = {divmod(number, CHUNKS): place * SLOTS for number, place in enumerate(places)}
        bases = torch.zeros(TABLES * MAX_CHUNKS, dtype=torch.int64)
        for (table, chunk), base in self.bases.items():
            bases[table * MAX_CHUNKS + chunk] = base
        ticks = torch.zeros(TABLES * CHUNKS * SLOTS, dtype=torch.int32, device=device)
        self.touches = TouchView(ticks, bases.to(device)) if touches else None
        self.tick = 7
        self.evictions: list[tuple[int, int, int]] = []
        self.touched = dict.fromkeys(range(TABLES * CHUNKS * SLOTS), 0)

    def look_up(self, size: int, evicting: float) -> tuple[UniqueKeys, torch.Tensor]:
        """A lookup of ``size`` keys, a part of which evict others."""
        keys = [self.random.randrange(-(2**63), 2**63) for _ in range(size)]
        tables = [self.random.randrange(TABLES) for _ in range(size)]
        # Repeated, so that the Triton engine's arrays are longer than what is in them.
        keys, tables = keys + keys[: size // 3], tables + tables[: size // 3]
        unique = dedup(int64(keys, self.device), int32(tables, self.device), TABLES, 1)
        count, self.tick = int(unique.count), self.tick + 1
        others = [KeyStatus.FOUND, KeyStatus.INSERTED, REFUSED]
        status = [REPLACED if self.random.random() < evicting else self.random.choice(others) for _ in range(count)]
        evicted = [self.random.randrange(-(2**63), 2**63) for _ in range(count)]
        slots = []
        for table, kind, key in zip(unique.tables[:count].tolist(), status, evicted, strict=True):
            chunk, place = self.random.randrange(CHUNKS), self.random.randrange(SLOTS)
            handle = ((table * MAX_CHUNKS + chunk) << CHUNK_SHIFT) | place
            slots.append(-1 if kind is REFUSED else handle)
            if kind is not REFUSED:
                self.touched[self.bases[table, chunk] + place] = self.tick
            if kind is REPLACED:
                self.evictions.append((key, table, self.tick))
        # What follows the last distinct key reads like an eviction.
        padding = unique.keys.numel() - count
        insertion = Insertion(
            int64([*status, *[REPLACED] * padding], self.device).to(torch.int8),
            int64([*evicted, *[-5] * padding], self.device),
            int64([0] * (count + padding), self.device),
        )
        handles = int64([*slots, *[0] * padding], self.device)
        outcomes = torch.zeros(TABLES, len(KeyStatus), dtype=torch.int64, device=self.device)
        clock = torch.zeros(TABLES, dtype=torch.int64, device=self.device)
        numbers = tally(unique, insertion.status, outcomes, clock, self.log)
        assert numbers is not None and int(numbers.sum()) == status.count(REPLACED)
        note(unique, handles, insertion, numbers, self.log, self.touches)
        self.compare()
        return unique, handles

    def touch_late(self, looked_up: tuple[UniqueKeys, torch.Tensor]) -> None:
        """An update of an earlier lookup."""
        assert self.touches is not None
        unique, slots = looked_up
        note_touches(unique, slots, self.log.tick, self.touches)
        for handle in slots[: int(unique.count)].tolist():
            if handle >= 0:
                table, chunk = divmod(handle >> CHUNK_SHIFT, MAX_CHUNKS)
                self.touched[self.bases[table, chunk] + handle % 2**CHUNK_SHIFT] = self.tick
        self.compare()

    def compare(self) -> None:
        """The time, the number of evictions, every entry of the ring and the time of every slot's last touch."""
        assert self.log.tick.tolist() == [self.tick] and self.log.count.tolist() == [len(self.evictions)]
        expected = [(-1, -1, -1)] * self.ring
        for number, eviction in enumerate(self.evictions):
            expected[number % self.ring] = eviction
        parts = (self.log.keys, self.log.tables, self.log.ticks)
        assert list(zip(*(part.tolist() for part in parts))) == expected
        if self.touches is not None:
            assert self.touches.ticks.tolist() == list(self.touched.values())
