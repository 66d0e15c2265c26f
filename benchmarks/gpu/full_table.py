"""One table of any load, driven by kernels alone, with batches of keys that are in it or not."""

from __future__ import annotations

import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.fill import fill
from dynamicemb.kernels.find import find
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import METADATA_BYTES_PER_SLOT, OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.views import KeyBatch, Scores, ScoreSource, UniqueKeys
from dynamicemb.table.initializers import initializer_view
from dynamicemb.table.storage import Chunk, GroupStorage
from gpu.tables import BUCKET_CAPACITY, INITIALIZER

__all__ = ["KEYS_PER_SLOT", "FullTable"]

#: Distinct keys, for each slot, that leave no bucket with an empty one: a bucket of 128 then gets 205 +- 14 of them.
KEYS_PER_SLOT = 1.6
#: An odd number, so that its multiples modulo a power of two visit every slot once, in no order to speak of.
STRIDE = 0x9E3779B1


class FullTable:
    """Rows of float32 without optimizer state. Keys are numbered as they are made.

    Args:
        slots: a power of two.
        dim: columns.
        step_keys: inserted at once while filling.
        device: where it lives.
    """

    def __init__(self, slots: int, dim: int, step_keys: int, device: torch.device) -> None:
        assert slots & (slots - 1) == 0
        self.slots, self.step_keys, self.device = slots, step_keys, device
        layout = RowLayout(dim, torch.float32, OptimizerKind.SGD)
        geometry = TableGeometry.create(slots, slots, BUCKET_CAPACITY)
        self.storage = GroupStorage([geometry], layout, 1, device)
        self.initializer = initializer_view(["t0"], [0], [INITIALIZER], [0.0], device)
        self._filled = self._next_key = self._clock = self._tried = 0
        self._saved: list[torch.Tensor] = []
        rows = self.chunk.rows.view(torch.float32)
        for part in rows.split(max(1, (1 << 30) // dim)):
            part.uniform_()

    @property
    def chunk(self) -> Chunk:
        """All of the table: it cannot grow."""
        return self.storage.chunks[0][0]

    @property
    def buckets(self) -> int:
        return self.slots // BUCKET_CAPACITY

    @property
    def metadata_bytes(self) -> int:
        return self.slots * METADATA_BYTES_PER_SLOT

    @property
    def load(self) -> float:
        """Share of the slots that hold a key. Synchronises."""
        return int(torch.count_nonzero(self.chunk.digests)) / self.slots

    def fill_to(self, load: float) -> None:
        """Inserts keys until ``load`` is reached; for 1, until no slot is empty but by rare chance."""
        total = int((KEYS_PER_SLOT if load == 1 else load) * self.slots)
        while self._filled < total:
            count = min(self.step_keys, total - self._filled)
            unique = self.distinct(self.fresh(count))
            self.find_or_insert(unique, self.scores())
            self._filled += count

    def fresh(self, count: int) -> torch.Tensor:
        """int64 [count], keys that never were in the table."""
        self._next_key += count
        return torch.arange(self._next_key - count, self._next_key, device=self.device)

    def present(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [count] distinct keys that are in the table, in no order, and the slots they are in. Synchronises."""
        tried = min(self.slots, int(1.2 * count / self.load) + 64)
        self._tried += tried
        steps = torch.arange(self._tried - tried, self._tried, device=self.device)
        candidates = steps * STRIDE & (self.slots - 1)
        slots = candidates[self.chunk.digests[candidates] != 0][:count]
        assert slots.numel() == count, f"{slots.numel()} keys in {tried} slots; {count} wanted"
        return self.chunk.keys[slots], slots

    def distinct(self, keys: torch.Tensor) -> UniqueKeys:
        """The keys as the other operations of a step get them. Does not synchronise."""
        return dedup(keys, self._tables(keys), 1, 1)

    def in_any_order(self, keys: torch.Tensor) -> KeyBatch:
        return KeyBatch(keys, self._tables(keys))

    def _tables(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.zeros(keys.numel(), dtype=torch.int32, device=self.device)

    def scores(self) -> Scores:
        """Of a batch, greater than all before."""
        self._clock += 1
        return Scores(torch.full((1,), self._clock, dtype=torch.int64, device=self.device), ScoreSource.TABLE)

    def find_or_insert(self, unique: UniqueKeys, scores: Scores, rows: bool = False) -> torch.Tensor:
        """Slots of the keys; absent ones are inserted, with their first row if ``rows``. Does not synchronise."""
        view = self.storage.view
        status = torch.empty(unique.keys.shape, dtype=torch.int8, device=self.device)
        slots = find(view, unique, scores, status=status)
        insertion = insert(view, unique, slots, scores, status)
        if rows:
            fill(view, unique, slots, insertion.status, self.initializer)
        return slots

    def save(self) -> None:
        """Remembers what is in which slot."""
        self._saved = [tensor.clone() for tensor in self._metadata()]

    def restore(self) -> None:
        """Brings that back; it also pushes everything else out of the cache. Does not synchronise."""
        for tensor, saved in zip(self._metadata(), self._saved, strict=True):
            tensor.copy_(saved)

    def _metadata(self) -> list[torch.Tensor]:
        return [self.chunk.digests, self.chunk.keys, self.chunk.scores]
