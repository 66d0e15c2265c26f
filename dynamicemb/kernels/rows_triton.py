"""Rows of float32, float16 and bfloat16 in Triton kernels: where they are, how they are read, added up and written.

Masked lanes: functions that read memory take ``mask`` and give harmless values (never an address) where it is False.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.triton_support import address_of, aligned
from dynamicemb.kernels.views import AddressRow

__all__ = [
    "DTYPE_CODES", "add_rows", "column_tile", "float_view", "read_row", "rounded_to",
    "row_pointers", "row_tile", "row_warps", "state_pointers", "sum_rows", "sum_rows_registers", "word_pointers",
    "write_row",
]  # fmt: skip

_ROWS = tl.constexpr(int(AddressRow.ROWS))

_FLOAT32 = tl.constexpr(0)
_FLOAT16 = tl.constexpr(1)
_BFLOAT16 = tl.constexpr(2)
#: How kernels are told the dtype of a row. bfloat16 travels as bits: the interpreter's own conversion does not round.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def sum_rows_registers(dim: int) -> int:
    """Launch option of kernels that call :func:`sum_rows`.

    Left to itself, ptxas aims at 40 registers and so at full occupancy, and issues one or two loads at a time. 64
    registers hold 8 of them, as the SASS shows, and leave room for 32 warps: as many as fit if each is a program. Where
    a warp has several rows, each thread has positions of its own, and masks where rows end. That takes up to 16 more,
    and leaves 24 warps.
    """
    return 64 if row_tile(dim, warps=1) == 1 else 80


@triton.jit
def row_pointers(addresses, chunks, slots, mask, ROW_BYTES: tl.constexpr, DTYPE: tl.constexpr):
    """Where each row begins, as pointers to DTYPE; 16-byte aligned, as the layout promises."""
    address = address_of(addresses, chunks, slots, mask, _ROWS, ROW_BYTES)
    if DTYPE == _FLOAT32:
        return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    elif DTYPE == _FLOAT16:
        return tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), 16)


@triton.jit
def state_pointers(addresses, chunks, slots, mask, ROW_BYTES: tl.constexpr, OFFSET: tl.constexpr):
    """Where the optimizer state of each row begins, ``OFFSET`` bytes into it."""
    # The offset is added to the pointer: Triton 3.9 moves it there, and would drop the alignment of the sum on the way.
    return row_pointers(addresses, chunks, slots, mask, ROW_BYTES, _FLOAT32) + OFFSET // 4


@triton.jit
def word_pointers(addresses, chunks, slots, mask, ROW_BYTES: tl.constexpr):
    """Where each row begins, as 32-bit words."""
    address = address_of(addresses, chunks, slots, mask, _ROWS, ROW_BYTES)
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def read_row(pointers, mask, DTYPE: tl.constexpr):
    """float32 values of a row of DTYPE; 0 where masked."""
    stored = tl.load(pointers, mask=mask, other=0)
    if DTYPE == _BFLOAT16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def bfloat16_bits(values):
    """float32 -> the bits of the nearest bfloat16, ties to even, as uint16; every NaN becomes the quiet one."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = ((bits.to(tl.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    return tl.where(values != values, tl.full([], 0x7FC0, tl.uint16), rounded)


@triton.jit
def rounded_to(values, DTYPE: tl.constexpr):
    """float32 values after a trip through DTYPE."""
    if DTYPE == _BFLOAT16:
        return (bfloat16_bits(values).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == _FLOAT16:
        return values.to(tl.float16).to(tl.float32)
    else:
        return values


@triton.jit
def write_row(pointers, values, mask, DTYPE: tl.constexpr):
    """Stores float32 values as a row of DTYPE, rounded to nearest even."""
    if DTYPE == _BFLOAT16:
        tl.store(pointers, bfloat16_bits(values), mask=mask)
    elif DTYPE == _FLOAT16:
        tl.store(pointers, values.to(tl.float16), mask=mask)
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit
def sum_rows(
    values, order, block_sums, begins, ends, columns, DIM: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """float32 [R, C], sums of the rows ``values[order[begins:ends]]`` of ``DIM`` columns of each of R keys.

    In the order of :mod:`~dynamicemb.kernels.segment_sum`: sums of whole blocks first, which are rows of ``block_sums``
    from ``begins // BLOCK`` on, then the rest.
    """
    total = tl.zeros([begins.shape[0], columns.shape[0]], tl.float32)
    blocks = (ends - begins) // BLOCK
    most = tl.max(blocks, axis=0)
    first = tl.zeros_like(most)
    while first < most:
        positions = ()
        for step in tl.static_range(8):
            # Row 0 stands for blocks that there are not, so that nothing is read that is not there.
            positions += (tl.where(first + step < blocks, begins // BLOCK + first + step, 0),)  # type: ignore[assignment]
        total = add_some_rows(total, block_sums, positions, first, blocks, columns, DIM, _FLOAT32)
        first += 8
    return add_rows(total, values, order, begins + blocks * BLOCK, ends, columns, DIM, DTYPE, 8)


@triton.jit
def add_rows(
    total, values, order, begins, ends, columns, DIM: tl.constexpr, DTYPE: tl.constexpr, LOADS: tl.constexpr
):  # fmt: skip
    """``total`` [R, C] plus, one after the other, the rows ``values[order[begins:ends]]`` of ``DIM`` columns.

    The order of additions is part of the contract. What overlaps are the loads: ``LOADS`` rows are under way in the
    long loop and 4 in the short one, which is all that most keys run.
    """
    longest = tl.max(ends - begins, axis=0)
    first = tl.zeros_like(longest)
    while first + LOADS <= longest:
        positions = positions_of(order, begins + first, ends, LOADS)
        total = add_some_rows(total, values, positions, begins + first, ends, columns, DIM, DTYPE)
        first += LOADS
    while first < longest:
        positions = positions_of(order, begins + first, ends, 4)
        total = add_some_rows(total, values, positions, begins + first, ends, columns, DIM, DTYPE)
        first += 4
    return total


@triton.jit
def positions_of(order, begins, ends, COUNT: tl.constexpr):
    # Past its end a key reads its last row again, which costs a hit in the cache: masks would need one predicate
    # register for each row under way, and with seven of them loads line up.
    last = tl.maximum(ends - 1, 0)
    positions = ()
    for step in tl.static_range(COUNT):
        positions += (tl.load(order + tl.minimum(begins + step, last)),)  # type: ignore[assignment]
    return positions


@triton.jit
def add_some_rows(total, values, positions, begins, ends, columns, DIM: tl.constexpr, DTYPE: tl.constexpr):
    # All rows, then all sums, so that the loads are under way together.
    rows = ()
    for step in tl.static_range(len(positions)):
        at = values + (positions[step] * DIM)[:, None] + columns[None, :]
        rows += (read_row(at, (columns < DIM)[None, :], DTYPE),)  # type: ignore[assignment]
    for step in tl.static_range(len(positions)):
        total = tl.where((begins + step < ends)[:, None], total + rows[step], total)
    return total


def float_view(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as kernels take it, bfloat16 as its bits (uint16)."""
    tensor = aligned(tensor)
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


def column_tile(dim: int) -> int:
    """Columns of a tile that holds rows of ``dim``: the next power of two."""
    return 1 << (dim - 1).bit_length()


def row_tile(dim: int, values_per_thread: int = 4, warps: int = 4) -> int:
    """Rows of ``dim`` columns for one program: by default 16 bytes of float32 for each of 128 threads."""
    return max(1, 32 * warps * values_per_thread // column_tile(dim))


def row_warps(dim: int, values_per_thread: int = 4, warps: int = 4) -> int:
    """Warps of a program of :func:`row_tile` rows: more than ``warps`` only where one row alone has more values."""
    return max(warps, column_tile(dim) // (32 * values_per_thread))
