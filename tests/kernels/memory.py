"""Memory of a group of tables, built by hand: what kernels see without any of the owners above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS, RowLayout, TableGeometry
from dynamicemb.kernels.split import split
from dynamicemb.kernels.views import AddressRow, GroupView

# Keys and scores of slots that were never written: no kernel may read them as anything.
GARBAGE_KEY = 0
GARBAGE_SCORE = -(2**63)


@dataclass
class Chunk:
    """One allocation: digests uint8 [slots], keys and scores int64 [slots], rows uint8 [slots, row_bytes]."""

    digests: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor
    rows: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.digests, self.keys, self.scores, self.rows

    @staticmethod
    def allocate(slots: int, row_bytes: int, device: str) -> Chunk:
        """Empty digests over garbage: key 0 with the least score in every slot, rows of NaN (all bits set)."""
        return Chunk(
            torch.zeros(slots, dtype=torch.uint8, device=device),
            torch.full((slots,), GARBAGE_KEY, dtype=torch.int64, device=device),
            torch.full((slots,), GARBAGE_SCORE, dtype=torch.int64, device=device),
            torch.full((slots, row_bytes), 255, dtype=torch.uint8, device=device),
        )


class GroupMemory:
    """Chunks, addresses and geometry of a group; ``view`` is what kernels take."""

    def __init__(
        self, geometries: Sequence[TableGeometry], layout: RowLayout, world_size: int = 1, device: str = "cpu"
    ) -> None:
        assert len({geometry.bucket_capacity for geometry in geometries}) == 1
        self.geometries = list(geometries)
        self.layout = layout
        self.chunks: list[list[Chunk]] = [[] for _ in geometries]
        self.view = GroupView(
            torch.zeros(len(AddressRow), len(geometries) * MAX_CHUNKS, dtype=torch.int64, device=device),
            torch.zeros(len(geometries), 3, dtype=torch.int64, device=device),
            geometries[0].bucket_capacity,
            world_size,
            layout,
        )
        for table in range(len(geometries)):
            for _ in range(self.geometries[table].levels + 1):
                self._add_chunk(table)

    def _add_chunk(self, table: int) -> None:
        geometry, number = self.geometries[table], len(self.chunks[table])
        slots = geometry.chunk_buckets(number) * geometry.bucket_capacity
        chunk = Chunk.allocate(slots, self.layout.row_bytes, str(self.view.device))
        self.chunks[table].append(chunk)
        addresses = [part.data_ptr() for part in chunk.parts]
        self.view.addresses[:, table * MAX_CHUNKS + number] = torch.tensor(addresses)
        self.view.geometry[table] = torch.tensor([geometry.max_buckets, geometry.shift, geometry.levels])

    def grow(self, table: int) -> None:
        """Doubles a table: a chunk more, the new geometry, and the move of what changes its bucket."""
        buckets = self.geometries[table].buckets
        self.geometries[table] = self.geometries[table].doubled()
        self._add_chunk(table)
        split(self.view, table, buckets)

    def _places(self, slots: torch.Tensor) -> list[tuple[int, Chunk, int]]:
        """(position in ``slots``, chunk, index in the chunk) of each handle that is a slot."""
        return [
            (position, self.chunks[(handle >> CHUNK_SHIFT) // MAX_CHUNKS][(handle >> CHUNK_SHIFT) % MAX_CHUNKS], index)
            for position, handle in enumerate(slots.tolist())
            if handle >= 0
            for index in [handle & ((1 << CHUNK_SHIFT) - 1)]
        ]

    def row_bytes(self, slots: torch.Tensor) -> torch.Tensor:
        """uint8 [len(slots), row_bytes], the raw rows; zeros for −1."""
        raw = torch.zeros(len(slots), self.layout.row_bytes, dtype=torch.uint8, device=self.view.device)
        for position, chunk, index in self._places(slots):
            raw[position] = chunk.rows[index]
        return raw

    def embeddings(self, slots: torch.Tensor) -> torch.Tensor:
        """The stored embeddings, in the layout's dtype, [len(slots), dim]."""
        used_bytes = self.layout.dim * self.layout.embedding_dtype.itemsize
        return self.row_bytes(slots)[:, :used_bytes].contiguous().view(self.layout.embedding_dtype)

    def states(self, slots: torch.Tensor) -> torch.Tensor:
        """The stored optimizer states, float32 [len(slots), state_width]."""
        begin = self.layout.state_offset_bytes
        return self.row_bytes(slots)[:, begin : begin + 4 * self.layout.state_width].contiguous().view(torch.float32)

    def write(self, slots: torch.Tensor, embeddings: torch.Tensor, states: torch.Tensor) -> None:
        """Overwrites rows: embeddings [len(slots), dim] in the layout's dtype, states float32 [.., state_width]."""
        assert embeddings.dtype is self.layout.embedding_dtype and states.dtype is torch.float32
        raw_embeddings = embeddings.contiguous().view(torch.uint8)
        begin = self.layout.state_offset_bytes
        for position, chunk, index in self._places(slots):
            chunk.rows[index, : raw_embeddings.shape[1]] = raw_embeddings[position]
            if self.layout.state_width:
                end = begin + 4 * self.layout.state_width
                chunk.rows[index, begin:end] = states[position].contiguous().view(torch.uint8)

    def occupied(self, table: int) -> dict[int, tuple[int, int, int]]:
        """Slot handle -> (digest, key, score) of every slot whose digest is not 0."""
        entries: dict[int, tuple[int, int, int]] = {}
        for number, chunk in enumerate(self.chunks[table]):
            indices = torch.nonzero(chunk.digests).flatten()
            first = (table * MAX_CHUNKS + number) << CHUNK_SHIFT
            columns = (first + indices, chunk.digests[indices], chunk.keys[indices], chunk.scores[indices])
            for handle, digest, key, score in zip(*(column.tolist() for column in columns)):
                entries[handle] = (digest, key, score)
        return entries

    def load(self, table: int, entries: dict[int, tuple[int, int, int]]) -> None:
        """Writes slots by hand: handle -> (digest, key, score)."""
        for handle, (digest, key, score) in entries.items():
            assert (handle >> CHUNK_SHIFT) // MAX_CHUNKS == table
            chunk = self.chunks[table][(handle >> CHUNK_SHIFT) % MAX_CHUNKS]
            index = handle & ((1 << CHUNK_SHIFT) - 1)
            chunk.digests[index], chunk.keys[index], chunk.scores[index] = digest, key, score

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of every byte of the group, to be compared with :meth:`changed_since`."""
        return [part.clone() for chunk in self._all_chunks() for part in chunk.parts]

    def changed_since(self, snapshot: list[torch.Tensor]) -> bool:
        parts = [part for chunk in self._all_chunks() for part in chunk.parts]
        return len(parts) != len(snapshot) or not all(map(torch.equal, parts, snapshot))

    def _all_chunks(self) -> list[Chunk]:
        return [chunk for chunks in self.chunks for chunk in chunks]
