"""What is in a table, out of it and into it, in the order of the mixed key: for checkpoints and for inspection.

Buckets are monotone in the mixed key, so a table is walked bucket by bucket, a few thousand at a time, and only what
was found in them has to be sorted. Nothing here is part of a training step; it consists of torch's own operations, on
any device, and of the kernel that places keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb.kernels.hashing import mix64, sortable
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS, NO_SLOT, TableGeometry
from dynamicemb.kernels.views import Scores, UniqueKeys
from dynamicemb.table.storage import Chunk, GroupStorage

__all__ = ["SlotRun", "StoredRows", "TableContents"]

_OFFSET_MASK = (1 << CHUNK_SHIFT) - 1
#: Slots that are looked at together: 17 bytes of metadata each, and as many again while they are sorted.
_SCANNED_SLOTS = 1 << 16


@dataclass(frozen=True)
class SlotRun:
    """Keys that follow each other in the order of the mixed key, and where they are.

    Attributes:
        keys: int64 [n].
        slots: int64 [n], slot handles.
        scores: int64 [n].
        mixed: int64 [n], the mixed keys' bits.
    """

    keys: torch.Tensor
    slots: torch.Tensor
    scores: torch.Tensor
    mixed: torch.Tensor

    def __len__(self) -> int:
        return self.keys.numel()

    def __getitem__(self, rows: slice) -> SlotRun:
        return SlotRun(self.keys[rows], self.slots[rows], self.scores[rows], self.mixed[rows])


@dataclass(frozen=True)
class StoredRows:
    """Rows of a table, in ascending order of the mixed key as an unsigned number.

    Attributes:
        keys: int64 [n].
        slots: int64 [n], slot handles.
        scores: int64 [n].
        embeddings: [n, dim] in the table's dtype.
        states: float32 [n, width] by name of the optimizer state.
    """

    keys: torch.Tensor
    slots: torch.Tensor
    scores: torch.Tensor
    embeddings: torch.Tensor
    states: dict[str, torch.Tensor]


class TableContents:
    """One table of a group.

    Args:
        storage: of the group.
        table: its number there.
    """

    def __init__(self, storage: GroupStorage, table: int) -> None:
        self._storage, self._table = storage, table
        self._layout = storage.layout

    @property
    def _chunks(self) -> list[Chunk]:
        return self._storage.chunks[self._table]

    # ------------------------------------------------------------------------------------------------ out

    def count(self) -> int:
        """Rows. Waits for the device."""
        return sum(int(torch.count_nonzero(chunk.digests)) for chunk in self._chunks)

    def runs(self, max_rows: int, selected: Optional[Callable[[int, slice], torch.Tensor]] = None) -> Iterator[SlotRun]:
        """Everything in the table, in runs of 1 to ``max_rows`` keys. Waits for the device.

        Args:
            max_rows: keys of a run, at most.
            selected: called with the number of a chunk and a range of its slots; returns bool [slots], which of them
                to take, if there is a key in them. None: all.
        """
        geometry = self._storage.geometries[self._table]
        capacity = geometry.bucket_capacity
        step = max(1, _SCANNED_SLOTS // capacity)
        for first in range(0, geometry.buckets, step):
            slots, keys, scores = [], [], []
            for number, chunk in enumerate(self._chunks):
                begin, end = geometry.chunk_range(number, first, min(first + step, geometry.buckets))
                place = slice(begin * capacity, end * capacity)
                taken = chunk.digests[place] != 0
                if selected is not None:
                    taken &= selected(number, place)
                offsets = taken.nonzero().squeeze(1) + place.start
                slots.append(((self._table * MAX_CHUNKS + number) << CHUNK_SHIFT) | offsets)
                # index_select takes a quarter of the time of an index in brackets.
                keys.append(chunk.keys.index_select(0, offsets))
                scores.append(chunk.scores.index_select(0, offsets))
            run = _sorted(_joined(keys), _joined(slots), _joined(scores))
            for start in range(0, len(run), max_rows):
                yield run[start : start + max_rows]

    def read(self, run: SlotRun) -> StoredRows:
        """The rows of a run, copied out on the device. Does not wait for it if the table has never grown."""
        layout = self._layout
        states = {
            state.name: self._columns(
                run.slots, torch.float32, layout.state_offset_bytes // 4 + state.offset, state.width
            )
            for state in layout.states
        }
        embeddings = self._columns(run.slots, layout.embedding_dtype, 0, layout.dim)
        return StoredRows(run.keys, run.slots, run.scores, embeddings, states)

    def read_into(self, run: SlotRun, embeddings: torch.Tensor, states: dict[str, torch.Tensor]) -> None:
        """The rows of a run, into host memory that the caller uses again: fresh memory costs more than a copy.

        Args:
            run: n keys.
            embeddings: [n, dim] in the table's dtype.
            states: float32 [n, width] by name, of those states that are wanted.
        """
        layout = self._layout
        self._columns(run.slots, layout.embedding_dtype, 0, layout.dim, embeddings)
        for state in layout.states:
            if state.name in states:
                first = layout.state_offset_bytes // 4 + state.offset
                self._columns(run.slots, torch.float32, first, state.width, states[state.name])

    def _columns(
        self, slots: torch.Tensor, dtype: torch.dtype, first: int, width: int, target: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """``width`` values of ``dtype`` of each row, from value ``first`` on; in ``target``, if there is one."""
        out = target
        if out is None or out.device != slots.device:
            out = torch.empty(slots.numel(), width, dtype=dtype, device=slots.device)
        for places, offsets, chunk in self._by_chunk(slots):
            values = chunk.rows.view(dtype)[:, first : first + width]
            if places is None:
                torch.index_select(values, 0, offsets, out=out)
            else:
                out[places] = values[offsets]
        return out if target is None or out is target else target.copy_(out)

    def _by_chunk(self, slots: torch.Tensor) -> Iterator[tuple[Optional[torch.Tensor], torch.Tensor, Chunk]]:
        """(positions in ``slots``, offsets in the chunk, chunk); positions None: all of them."""
        offsets = slots & _OFFSET_MASK
        if len(self._chunks) == 1:
            yield None, offsets, self._chunks[0]
            return
        numbers = (slots >> CHUNK_SHIFT) - self._table * MAX_CHUNKS
        for number, chunk in enumerate(self._chunks):
            places = (numbers == number).nonzero().squeeze(1)
            if places.numel():
                yield places, offsets[places], chunk

    def all(self) -> StoredRows:
        """A copy of everything. Waits for the device."""
        runs = [self.read(run) for run in self.runs(_SCANNED_SLOTS)]
        if not runs:
            nothing = torch.empty(0, dtype=torch.int64, device=self._storage.device)
            return self.read(SlotRun(nothing, nothing, nothing, nothing))
        return StoredRows(
            keys=torch.cat([run.keys for run in runs]),
            slots=torch.cat([run.slots for run in runs]),
            scores=torch.cat([run.scores for run in runs]),
            embeddings=torch.cat([run.embeddings for run in runs]),
            states={state.name: torch.cat([run.states[state.name] for run in runs]) for state in self._layout.states},
        )

    # ------------------------------------------------------------------------------------------------ in

    def clear(self, geometry: TableGeometry) -> None:
        """Empties the table and gives it the size ``geometry``, in one chunk. Slots found earlier mean nothing then."""
        self._storage.replace(self._table, geometry)

    def insert(
        self, keys: torch.Tensor, scores: torch.Tensor, embeddings: torch.Tensor, states: dict[str, torch.Tensor]
    ) -> None:
        """Puts rows into a table that has none of their buckets' keys yet.

        Args:
            keys: int64 [n], distinct, in ascending order of the mixed key, owned by this rank; no more of one bucket
                than it has slots.
            scores: int64 [n].
            embeddings: [n, dim] in the table's dtype.
            states: float32 [n, width] by name, all that the optimizer has.
        """
        count = keys.numel()
        if count == 0:
            return
        numbers = torch.arange(count + 1, dtype=torch.int64, device=keys.device)
        unique = UniqueKeys(
            keys=keys,
            tables=torch.full((count,), self._table, dtype=torch.int32, device=keys.device),
            inverse=numbers[:-1].clone(),
            order=numbers[:-1].clone(),
            offsets=numbers,
            count=torch.full((1,), count, dtype=torch.int64, device=keys.device),
        )
        slots = torch.full_like(keys, NO_SLOT)
        insert(self._storage.view, unique, slots, Scores(scores))
        assert int(slots.min()) >= 0, "a bucket has more keys than slots"
        layout = self._layout
        for places, offsets, chunk in self._by_chunk(slots):
            columns = [(embeddings, layout.embedding_dtype, 0)]
            columns += [
                (states[state.name], torch.float32, layout.state_offset_bytes // 4 + state.offset)
                for state in layout.states
            ]
            for values, dtype, first in columns:
                target = chunk.rows.view(dtype)[:, first : first + values.shape[1]]
                target.index_copy_(0, offsets, values if places is None else values[places])


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # torch copies a single one, too


def _sorted(keys: torch.Tensor, slots: torch.Tensor, scores: torch.Tensor) -> SlotRun:
    mixed = mix64(keys)
    order = torch.argsort(sortable(mixed))
    return SlotRun(*(column.index_select(0, order) for column in (keys, slots, scores, mixed)))
