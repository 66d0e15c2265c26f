"""Device functions that the Triton kernels share: hashes, slots and the arrays of metadata.

Masked lanes: functions that read memory take ``mask`` and give harmless values (never an address) where it is False.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.hashing import GOLDEN_GAMMA, MIX_FACTOR_1, MIX_FACTOR_2
from dynamicemb.kernels.launch import POINTER_ALIGNMENT
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS
from dynamicemb.kernels.views import AddressRow, GeometryColumn, ScoreSource

__all__ = [
    "address_of", "aligned", "bucket_slot", "digest_of", "digest_pointers", "first_slot", "key_pointers",
    "line_pointers", "mix", "owner_of", "score_of", "score_pointers",
    "table_of",
]  # fmt: skip

_GAMMA = tl.constexpr(GOLDEN_GAMMA)
_FACTOR_1 = tl.constexpr(MIX_FACTOR_1)
_FACTOR_2 = tl.constexpr(MIX_FACTOR_2)
_CHUNK_SHIFT = tl.constexpr(CHUNK_SHIFT)
# MAX_CHUNKS is a power of two.
_TABLE_SHIFT = tl.constexpr(CHUNK_SHIFT + MAX_CHUNKS.bit_length() - 1)
_OFFSET_MASK = tl.constexpr((1 << CHUNK_SHIFT) - 1)
_MAX_CHUNKS = tl.constexpr(MAX_CHUNKS)
_GEOMETRY_COLUMNS = tl.constexpr(len(GeometryColumn))
_MAX_BUCKETS = tl.constexpr(int(GeometryColumn.MAX_BUCKETS))
_SHIFT = tl.constexpr(int(GeometryColumn.SHIFT))
_LEVELS = tl.constexpr(int(GeometryColumn.LEVELS))
_DIGESTS = tl.constexpr(int(AddressRow.DIGESTS))
_KEYS = tl.constexpr(int(AddressRow.KEYS))
_SCORES = tl.constexpr(int(AddressRow.SCORES))
_DIFFERENCE = tl.constexpr(int(ScoreSource.DIFFERENCE))
_TABLE = tl.constexpr(int(ScoreSource.TABLE))
_NEXT = tl.constexpr(int(ScoreSource.NEXT))


@triton.jit
def mix(keys):
    """``h``: uint64 for int64 keys; see :mod:`dynamicemb.kernels.hashing`."""
    x = keys.to(tl.uint64, bitcast=True) + _GAMMA
    x = (x ^ (x >> 30)) * _FACTOR_1
    x = (x ^ (x >> 27)) * _FACTOR_2
    return x ^ (x >> 31)


@triton.jit
def digest_of(mixed):
    return ((((mixed & 0xFFFF) * 255) >> 16) + 1).to(tl.uint8)


@triton.jit
def owner_of(mixed, world_size):
    return tl.umulhi(mixed, world_size.to(tl.uint64)).to(tl.int64)


@triton.jit
def bucket_slot(geometry, mixed, tables, world_size, mask, CAPACITY: tl.constexpr):
    """Handle of the first slot of each key's bucket, and so a name of the bucket; int64."""
    row = geometry + tables.to(tl.int64) * _GEOMETRY_COLUMNS
    max_buckets = tl.load(row + _MAX_BUCKETS, mask=mask, other=1).to(tl.uint64)
    shift = tl.load(row + _SHIFT, mask=mask, other=0).to(tl.uint64)
    levels = tl.load(row + _LEVELS, mask=mask, other=0)
    bucket = (tl.umulhi(mixed * world_size.to(tl.uint64), max_buckets) >> shift).to(tl.int64)
    return first_slot(bucket, levels, tables, CAPACITY)


@triton.jit
def first_slot(bucket, levels, tables, CAPACITY: tl.constexpr):
    """Handle of the first slot of ``bucket`` after ``levels`` doublings; see :mod:`dynamicemb.kernels.layout`."""
    # The marker makes a bucket with no low bit set count `levels` trailing zeros: chunk 0. A power of two is exact in
    # float32, so its exponent is the number of trailing zeros.
    marked = bucket | (tl.full([], 1, tl.int64) << levels)
    exponent = (marked & -marked).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    zeros = exponent.to(tl.int64) - 127
    chunk = tables.to(tl.int64) * _MAX_CHUNKS + levels - zeros
    return (chunk << _CHUNK_SHIFT) | ((bucket >> tl.minimum(zeros + 1, levels)) * CAPACITY)


@triton.jit
def address_of(addresses, chunks, slots, mask, KIND: tl.constexpr, BYTES: tl.constexpr):
    """Address (int64) of the entry of ``BYTES`` bytes that ``slots`` have in the arrays of an ``AddressRow`` KIND."""
    base = tl.load(addresses + KIND * chunks + (slots >> _CHUNK_SHIFT), mask=mask, other=0)
    # int64: slot * row bytes passes 2**31 at 4M rows of 128 float32.
    return base + (slots & _OFFSET_MASK) * BYTES


@triton.jit
def table_of(slots):
    """Number of the table that each slot belongs to; meaningless for negative slots."""
    return slots >> _TABLE_SHIFT


@triton.jit
def digest_pointers(addresses, chunks, slots, mask):
    return address_of(addresses, chunks, slots, mask, _DIGESTS, 1).to(tl.pointer_type(tl.uint8))


@triton.jit
def line_pointers(addresses, chunks, buckets, mask, CAPACITY: tl.constexpr):
    """Where the digests of each bucket, named by its first slot, begin."""
    ALIGNMENT: tl.constexpr = 16 if CAPACITY >= 16 else CAPACITY
    return tl.multiple_of(
        address_of(addresses, chunks, buckets, mask, _DIGESTS, 1).to(tl.pointer_type(tl.uint8)), ALIGNMENT
    )


@triton.jit
def key_pointers(addresses, chunks, slots, mask):
    return address_of(addresses, chunks, slots, mask, _KEYS, 8).to(tl.pointer_type(tl.int64))


@triton.jit
def score_pointers(addresses, chunks, slots, mask):
    return address_of(addresses, chunks, slots, mask, _SCORES, 8).to(tl.pointer_type(tl.int64))


@triton.jit
def score_of(numbers, source, entry, table, mask):
    """int64, for int64 entries and tables; see :class:`~dynamicemb.kernels.views.ScoreSource`.

    ``source`` is a number of the launch, so that all of them share their machine code: testing it costs nothing beside
    the loads.
    """
    at = tl.where(source >= _TABLE, table, entry)
    score = tl.load(numbers + at, mask=mask, other=0)
    if source == _DIFFERENCE:
        score = tl.load(numbers + at + 1, mask=mask, other=0) - score
    if source == _NEXT:
        score += 1
    return score


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as kernels take it: contiguous, beginning where a launch wants it, and copied only if it must be."""
    tensor = tensor.contiguous()
    if tensor.is_meta or tensor.data_ptr() % POINTER_ALIGNMENT == 0:
        return tensor
    return tensor.clone()
