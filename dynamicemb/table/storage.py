"""Owner of a group's memory: the chunks of every table, and their addresses."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamicemb.errors import ConfigError, OutOfMemoryError
from dynamicemb.kernels.host_memory import zeroed_bytes
from dynamicemb.kernels.layout import MAX_CHUNKS, METADATA_BYTES_PER_SLOT, RowLayout, TableGeometry
from dynamicemb.kernels.split import split
from dynamicemb.kernels.views import AddressRow, GroupView
from dynamicemb.table.memory import allocating

__all__ = ["Chunk", "GroupStorage", "state_memory"]


def state_memory() -> torch.inference_mode:
    """Inside it are made the tensors that later steps write to: what is made in ``torch.inference_mode`` could not be
    written to outside of it, and a table may grow or begin to note its changes in a lookup of either kind. May also
    decorate a function."""
    return torch.inference_mode(False)


@dataclass(frozen=True)
class Chunk:
    """Slots of one table that were allocated together.

    Attributes:
        digests: uint8 [slots], 0 = empty.
        keys, scores: int64 [slots], meaningful where the digest is not 0.
        rows: uint8 [slots, row_bytes].
    """

    digests: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor
    rows: torch.Tensor

    @staticmethod
    @state_memory()
    def allocate(slots: int, layout: RowLayout, device: torch.device) -> Chunk:
        """``slots`` empty slots. Rows are aligned for 128-bit access; on a GPU only the digests are written, on the CPU
        nothing is, so that a chunk takes memory as it fills: in huge pages where it can, of which a few thousand keys
        touch all."""
        if device.type == "cpu":
            return Chunk(
                digests=zeroed_bytes(slots),
                keys=zeroed_bytes(8 * slots).view(torch.int64),
                scores=zeroed_bytes(8 * slots).view(torch.int64),
                rows=zeroed_bytes(slots * layout.row_bytes).view(slots, layout.row_bytes),
            )
        return Chunk(
            digests=torch.zeros(slots, dtype=torch.uint8, device=device),
            keys=torch.empty(slots, dtype=torch.int64, device=device),
            scores=torch.empty(slots, dtype=torch.int64, device=device),
            rows=torch.empty(slots, layout.row_bytes, dtype=torch.uint8, device=device),
        )

    def addresses(self) -> list[int]:
        """In the order of :class:`~dynamicemb.kernels.views.AddressRow`."""
        return [tensor.data_ptr() for tensor in (self.digests, self.keys, self.scores, self.rows)]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.digests, self.keys, self.scores, self.rows))


_SMALLER = (
    "lower num_embeddings or max_capacity, use more ranks, or rows of 16 bits (embedding_dtype); a smaller "
    "init_capacity takes memory only as the table fills"
)


class GroupStorage:
    """The memory of tables that share a row layout and a bucket capacity.

    Args:
        geometries: size of each table at first.
        layout: bytes of a row.
        world_size: ranks that share the tables.
        device: where the memory is taken.
        names: of the tables, for messages.

    Raises:
        ConfigError: no table, tables of different bucket capacities, or no rank.
        OutOfMemoryError: the device has no room for a table.
    """

    @state_memory()
    def __init__(
        self,
        geometries: Sequence[TableGeometry],
        layout: RowLayout,
        world_size: int,
        device: torch.device,
        names: Sequence[str] = (),
    ) -> None:
        if len({size.bucket_capacity for size in geometries}) != 1:
            capacities = sorted({size.bucket_capacity for size in geometries})
            raise ConfigError(f"the tables of a group have one bucket_capacity, and these have {capacities}")
        if world_size < 1:
            raise ConfigError(f"world_size={world_size} is not a number of ranks; use 1 or more")
        self.geometries = list(geometries)
        #: Tables that may still double, in ascending order.
        self.growable: list[int] = []
        self._names = [f"table '{name}'" for name in names] or [f"table {table}" for table in range(len(geometries))]
        self.layout = layout
        self.device = device
        self.chunks: list[list[Chunk]] = []
        bucket_capacity = geometries[0].bucket_capacity
        addresses = torch.zeros(len(AddressRow), len(geometries) * MAX_CHUNKS, dtype=torch.int64, device=device)
        geometry = torch.zeros(len(geometries), 3, dtype=torch.int64, device=device)
        self.view = GroupView(addresses, geometry, bucket_capacity, world_size, layout)
        for table, size in enumerate(geometries):
            self.chunks.append([])
            self._add_chunk(table, size.slots, "memory for", _SMALLER)
            self._store_geometry(table)

    def _add_chunk(self, table: int, slots: int, what: str, remedy: str) -> None:
        """All of a chunk, or an error before anything has changed."""
        num_bytes = slots * (METADATA_BYTES_PER_SLOT + self.layout.row_bytes)
        with allocating(f"{self._names[table]}: {what} {slots} rows", num_bytes, self.device, remedy):
            chunk = Chunk.allocate(slots, self.layout, self.device)
            self._store_addresses(table, len(self.chunks[table]), chunk)
        self.chunks[table].append(chunk)

    def _store_addresses(self, table: int, number: int, chunk: Chunk) -> None:
        addresses = torch.tensor(chunk.addresses(), dtype=torch.int64)
        self.view.addresses[:, table * MAX_CHUNKS + number] = addresses.to(self.device)

    def _store_all_addresses(self) -> None:
        for table, chunks in enumerate(self.chunks):
            for number, chunk in enumerate(chunks):
                self._store_addresses(table, number, chunk)

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupStorage:
        """With addresses of its own memory: a copy of the old ones would lead to the rows of the original."""
        result = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(result, name, copy.deepcopy(value, memo))
        result._store_all_addresses()
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As a copy: what is pickled lies elsewhere afterwards."""
        vars(self).update(state)
        self._store_all_addresses()

    def _store_geometry(self, table: int) -> None:
        size = self.geometries[table]
        numbers = torch.tensor([size.max_buckets, size.shift, size.levels], dtype=torch.int64)
        self.view.geometry[table] = numbers.to(self.device)
        if size.can_grow != (table in self.growable):
            bisect.insort(self.growable, table) if size.can_grow else self.growable.remove(table)

    def double(self, table: int) -> None:
        """Adds a chunk as large as the table is now (less at the very end) and moves the entries that belong there.

        Peak memory is the size afterwards: nothing is copied aside.

        Raises:
            OutOfMemoryError: the device has no room for the chunk. The table is as it was.
        """
        before = self.geometries[table]
        after = before.doubled()
        remedy = f"the table keeps its {before.slots} slots and what is in them; {_SMALLER}"
        self._add_chunk(table, after.chunk_buckets(after.levels) * after.bucket_capacity, "growing by", remedy)
        self.geometries[table] = after
        self._store_geometry(table)
        split(self.view, table, before.buckets)

    def replace(self, table: int, geometry: TableGeometry) -> None:
        """Gives a table new, empty memory of size ``geometry``, which has one chunk. The old memory is freed first.

        Raises:
            OutOfMemoryError: the device has no room for that. The table is empty, and of the least size it can have.
        """
        assert geometry.levels == 0, "a table that has grown has chunks that only growth makes"
        try:
            self._put_in_place(table, geometry)
        except OutOfMemoryError:
            self._put_in_place(table, TableGeometry.create(geometry.max_slots, 1, geometry.bucket_capacity))
            raise

    def _put_in_place(self, table: int, geometry: TableGeometry) -> None:
        columns = slice(table * MAX_CHUNKS, (table + 1) * MAX_CHUNKS)
        self.view.addresses[:, columns] = 0
        self.chunks[table].clear()
        self.geometries[table] = geometry
        self._add_chunk(table, geometry.slots, "memory for", f"the table is empty now; {_SMALLER}")
        self._store_geometry(table)

    @property
    def num_bytes(self) -> int:
        """Bytes of metadata and rows that are allocated now."""
        return sum(chunk.num_bytes for chunks in self.chunks for chunk in chunks)
