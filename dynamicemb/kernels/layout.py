"""Where everything is in memory: rows, slots, buckets, chunks. The one place that knows, shared by both engines.

A **table** has up to ``max_buckets`` buckets of ``bucket_capacity`` slots. A slot has a digest (uint8, 0 = empty), a
key (int64), a score (int64) and, at the same index, a row. Slots live in **chunks**: chunk 0 is allocated with the
table, and each doubling adds one, so that growing moves only the rows that change their bucket and copies no others.

**Bucket of a key.** With ``h = mix64(key)`` and unsigned 64-bit arithmetic, the owner among ``world_size`` ranks is
``hi64(h * world_size)``, the position inside the owner's range is ``p = lo64(h * world_size)``, and the bucket at full
size is ``hi64(p * max_buckets)``. A table that has not grown to its full size uses ``bucket >> shift`` instead, where
``shift`` falls by one with each doubling. All of these are monotone in ``h``, for any number of ranks and buckets.

**Place of a bucket.** Doubling turns bucket ``b`` into ``2b``, which stays where ``b`` was, and ``2b + 1``, which goes
to the new chunk. So after ``levels`` doublings bucket ``b`` lies in

* chunk 0 at index ``b >> levels`` if its low ``levels`` bits are all zero, else in
* chunk ``levels - z`` at index ``b >> (z + 1)``, with ``z`` the number of trailing zero bits of ``b``.

**Slot handle.** ``(chunk << 40) | (index * bucket_capacity + slot in bucket)``, where ``chunk`` counts through the
chunks of all tables of a group, :data:`MAX_CHUNKS` for each table. −1 means "no slot".
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb.errors import ConfigError
from dynamicemb.options import BUCKET_CAPACITIES, EMBEDDING_DTYPES, check_row_width

__all__ = [
    "CHUNK_SHIFT",
    "MAX_CHUNKS",
    "METADATA_BYTES_PER_SLOT",
    "NO_SLOT",
    "OptimizerKind",
    "OptimizerState",
    "RowLayout",
    "TableGeometry",
    "buckets_for",
    "optimizer_states",
    "table_bytes",
]

#: Bits of a slot handle that hold the place inside a chunk: 2**40 slots, more than any memory.
CHUNK_SHIFT = 40
#: Chunks that one table may have: chunk 0 and one for each doubling.
MAX_CHUNKS = 32
#: Handle of "no slot": an absent or a refused key.
NO_SLOT = -1
#: Digest (1) + key (8) + score (8).
METADATA_BYTES_PER_SLOT = 17
#: Rows and the optimizer state inside them start at multiples of this, so that they can be moved 128 bits at a time.
ROW_ALIGNMENT_BYTES = 16


class OptimizerKind(enum.IntEnum):
    """Optimizers that the update kernels know; the numbers are part of the kernel interface."""

    SGD = 0
    ADAGRAD = 1
    ROWWISE_ADAGRAD = 2
    ADAM = 3


@dataclass(frozen=True)
class OptimizerState:
    """One optimizer state of a row: ``width`` float32 values, ``offset`` values after the start of the state."""

    name: str
    width: int
    offset: int


def optimizer_states(kind: OptimizerKind, dim: int) -> tuple[OptimizerState, ...]:
    """The states that ``kind`` keeps in a row of ``dim`` columns, in memory order, named as ``torch.optim`` does."""
    if kind is OptimizerKind.ADAGRAD:
        return (OptimizerState("sum", dim, 0),)
    if kind is OptimizerKind.ROWWISE_ADAGRAD:
        return (OptimizerState("sum", 1, 0),)
    if kind is OptimizerKind.ADAM:
        return (OptimizerState("exp_avg", dim, 0), OptimizerState("exp_avg_sq", dim, dim))
    return ()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES


@dataclass(frozen=True)
class RowLayout:
    """A row in memory: ``[embedding | padding | optimizer state in float32 | padding]``, both parts 16-byte aligned.

    Raises:
        ConfigError: columns, a dtype or an optimizer that the kernels do not support.
    """

    dim: int
    embedding_dtype: torch.dtype
    optimizer: OptimizerKind

    def __post_init__(self) -> None:
        check_row_width(self.dim)
        if self.embedding_dtype not in EMBEDDING_DTYPES:
            names = ", ".join(str(dtype) for dtype in EMBEDDING_DTYPES)
            raise ConfigError(f"embedding_dtype={self.embedding_dtype} is not supported; use one of {names}")
        if not isinstance(self.optimizer, OptimizerKind):
            raise ConfigError(f"optimizer={self.optimizer!r} is not an OptimizerKind")

    # Computed once: kernels ask for them in every launch.
    @functools.cached_property
    def states(self) -> tuple[OptimizerState, ...]:
        return optimizer_states(self.optimizer, self.dim)

    @functools.cached_property
    def state_width(self) -> int:
        """float32 values of optimizer state in a row."""
        return sum(state.width for state in self.states)

    @functools.cached_property
    def state_offset_bytes(self) -> int:
        return _aligned(self.dim * self.embedding_dtype.itemsize)

    @functools.cached_property
    def row_bytes(self) -> int:
        return self.state_offset_bytes + _aligned(self.state_width * 4)


def buckets_for(rows: int, bucket_capacity: int) -> int:
    """Whole buckets that hold ``rows`` rows."""
    return max(1, -(-rows // bucket_capacity))


def _shifted_up(buckets: int, shift: int) -> int:
    """``ceil(buckets / 2**shift)``: the buckets of a table that is ``shift`` doublings from its full size."""
    return (buckets + (1 << shift) - 1) >> shift


@dataclass(frozen=True)
class TableGeometry:
    """Size of one table on one rank: its full size, how far it is from it, and how often it has doubled.

    Raises:
        ConfigError: a bucket capacity that the kernels do not support, or a size that no table can have.
    """

    max_buckets: int
    shift: int
    levels: int
    bucket_capacity: int

    def __post_init__(self) -> None:
        if self.bucket_capacity not in BUCKET_CAPACITIES:
            raise ConfigError(
                f"bucket_capacity={self.bucket_capacity} is not supported; use one of "
                f"{', '.join(str(capacity) for capacity in BUCKET_CAPACITIES)}"
            )
        if self.max_buckets < 1 or self.shift < 0 or not 0 <= self.levels < MAX_CHUNKS:
            raise ConfigError(
                f"a table of {self.max_buckets} buckets, {self.shift} doublings from that and {self.levels} from its "
                f"first size, cannot be; a table has 1 bucket or more and doubles {MAX_CHUNKS - 1} times at most"
            )

    @staticmethod
    def create(max_rows: int, init_rows: int, bucket_capacity: int) -> TableGeometry:
        """The smallest size from which doubling leads to exactly the full one and that holds ``init_rows``."""
        if max_rows < 1 or init_rows < 1:
            raise ConfigError(f"a table of {max_rows} rows, {init_rows} at first, cannot be; use 1 or more")
        max_buckets = buckets_for(max_rows, bucket_capacity)
        init_buckets = min(buckets_for(init_rows, bucket_capacity), max_buckets)
        shift = 0
        while shift < MAX_CHUNKS - 1 and _shifted_up(max_buckets, shift) > init_buckets:
            if _shifted_up(max_buckets, shift + 1) < init_buckets:
                break
            shift += 1
        return TableGeometry(max_buckets, shift, 0, bucket_capacity)

    @property
    def buckets(self) -> int:
        return _shifted_up(self.max_buckets, self.shift)

    @property
    def slots(self) -> int:
        """Rows that fit now."""
        return self.buckets * self.bucket_capacity

    @property
    def max_slots(self) -> int:
        """Rows that fit at full size: the table's capacity on this rank."""
        return self.max_buckets * self.bucket_capacity

    @property
    def can_grow(self) -> bool:
        return self.shift > 0

    def doubled(self) -> TableGeometry:
        assert self.can_grow
        return TableGeometry(self.max_buckets, self.shift - 1, self.levels + 1, self.bucket_capacity)

    def chunk_range(self, chunk: int, first_bucket: int, stop_bucket: int) -> tuple[int, int]:
        """Which indexes of chunk ``chunk`` hold those of the buckets ``first_bucket`` to ``stop_bucket`` (exclusive)
        that lie in it: the inverse of "place of a bucket" above. One range, as index and bucket ascend together."""
        # Chunk 0 has the multiples of 2**levels; the others the odd multiples of 2**zeros.
        zeros = self.levels - chunk
        offset, stride = (0, 1 << self.levels) if chunk == 0 else (1 << zeros, 2 << zeros)
        first, stop = (max(0, -((offset - bucket) // stride)) for bucket in (first_bucket, stop_bucket))
        return first, stop

    def sized_for(self, rows: int, max_load_factor: float) -> TableGeometry:
        """A table of one chunk that a load of ``rows`` rows would not make grow, and no smaller than this one."""
        size = TableGeometry(self.max_buckets, self.shift, 0, self.bucket_capacity)
        while size.can_grow and rows > max_load_factor * size.slots:
            size = TableGeometry(size.max_buckets, size.shift - 1, 0, size.bucket_capacity)
        return size

    def with_slots(self, slots: int) -> Optional[TableGeometry]:
        """A table of one chunk that has grown to exactly ``slots``; None if that is none of its sizes."""
        for shift in range(MAX_CHUNKS):
            size = TableGeometry(self.max_buckets, shift, 0, self.bucket_capacity)
            if size.slots == slots:
                return size
        return None

    def chunk_buckets(self, chunk: int) -> int:
        """Buckets in chunk ``chunk`` (0 to ``levels``)."""
        total = _shifted_up(self.max_buckets, self.shift + self.levels - chunk)
        return total if chunk == 0 else total - _shifted_up(self.max_buckets, self.shift + self.levels - chunk + 1)


def table_bytes(max_rows: int, bucket_capacity: int, layout: RowLayout) -> int:
    """Bytes of a full-size table on one rank: metadata and rows with their optimizer state."""
    slots = buckets_for(max_rows, bucket_capacity) * bucket_capacity
    return slots * (METADATA_BYTES_PER_SLOT + layout.row_bytes)
