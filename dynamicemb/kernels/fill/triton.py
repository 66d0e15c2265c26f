"""First values on the GPU: Philox and float64 arithmetic, each operation rounded as the CPU engine rounds it.

Launched without fused multiply-adds. One Philox block gives four columns, so a program works on blocks and interleaves
their words. The normal quantile, the only costly part, is compiled in where a table of the group needs it, and runs
where a program has a key that does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.fill import (
    DEBUG_MODULUS,
    LEAST_NORMAL,
    LN_2,
    LOG_TERMS,
    QUANTILE_CENTRE_A,
    QUANTILE_CENTRE_B,
    QUANTILE_TAIL,
    QUANTILE_TAIL_C,
    QUANTILE_TAIL_D,
    SQRT_HALF,
    TWO_TO_54,
    FillMode,
)
from dynamicemb.kernels.launch import LaunchOptions, grid_stride_programs, launch
from dynamicemb.kernels.rows_triton import (
    DTYPE_CODES,
    column_tile,
    rounded_to,
    row_pointers,
    row_tile,
    row_warps,
    state_pointers,
    write_row,
)
from dynamicemb.kernels.triton_support import (
    aligned,
)
from dynamicemb.kernels.views import GroupView, InitializerView, KeyStatus, UniqueKeys

_INSERTED = tl.constexpr(int(KeyStatus.INSERTED))
_REPLACED = tl.constexpr(int(KeyStatus.REPLACED))
_CONSTANT = tl.constexpr(int(FillMode.CONSTANT))
_UNIFORM = tl.constexpr(int(FillMode.UNIFORM))
_NORMAL = tl.constexpr(int(FillMode.NORMAL))
_TRUNCATED_NORMAL = tl.constexpr(int(FillMode.TRUNCATED_NORMAL))
_DEBUG = tl.constexpr(int(FillMode.DEBUG))
_DEBUG_MODULUS = tl.constexpr(DEBUG_MODULUS)
_CENTRE_A = tl.constexpr(QUANTILE_CENTRE_A)
_CENTRE_B = tl.constexpr(QUANTILE_CENTRE_B)
_TAIL_C = tl.constexpr(QUANTILE_TAIL_C)
_TAIL_D = tl.constexpr(QUANTILE_TAIL_D)
_TAIL = tl.constexpr(QUANTILE_TAIL)
_SQRT_HALF = tl.constexpr(SQRT_HALF)
_LN_2 = tl.constexpr(LN_2)
_LOG_TERMS = tl.constexpr(LOG_TERMS)
# Philox4x32: Salmon et al. 2011, table 2 and section 4.3.
_PHILOX_A = tl.constexpr(0xD2511F53)
_PHILOX_B = tl.constexpr(0xCD9E8D57)
_WEYL_A = tl.constexpr(0x9E3779B9)
_WEYL_B = tl.constexpr(0xBB67AE85)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_TWO_TO_54 = tl.constexpr(TWO_TO_54)
_LEAST_NORMAL = tl.constexpr(LEAST_NORMAL)

# One warp for a row, so that no warp waits for another one's rows.
_WARPS = 1
# An SM holds 32 programs, so 32 warps, with up to 64 registers for each thread: fewer would bring no more of them.
_REGISTERS = 64
# Division and square root in float64, which the normal quantile needs, are subroutines with registers of their own.
# Programs of several narrow rows need some more, for the parameters of each.
_NORMAL_REGISTERS, _NARROW_NORMAL_REGISTERS = 128, 168
# Entries that a program looks at together: most often there is nothing to do for any of them. Two for each thread; with
# more, too few programs would share the rows of a batch in which all keys are new.
_TILE = 64


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 words; products and sums in uint64, where they cannot overflow."""
    for _ in tl.static_range(10):
        product_a = c0.to(tl.uint64) * _PHILOX_A
        product_b = c2.to(tl.uint64) * _PHILOX_B
        c0 = (product_b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_b.to(tl.uint32)
        c2 = (product_a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + _WEYL_A).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _WEYL_B).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _logarithm(p):
    """Natural logarithm of p in [0, 1], float64; what the CPU engine's ``frexp`` gives, from the bits."""
    subnormal = p < _LEAST_NORMAL
    bits = tl.where(subnormal, p * _TWO_TO_54, p).to(tl.int64, bitcast=True)
    exponent = tl.where(p == 0.0, 0, (bits >> 52) - 1022 - tl.where(subnormal, 54, 0))
    fraction = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    fraction = tl.where(p == 0.0, 0.0, fraction)
    low = fraction < _SQRT_HALF
    fraction = tl.where(low, fraction * 2.0, fraction)
    exponent = tl.where(low, exponent - 1, exponent)
    s = (fraction - 1.0) / (fraction + 1.0)
    square = s * s
    series = tl.zeros_like(s) + 1.0 / (2 * _LOG_TERMS - 1)
    for term in tl.static_range(_LOG_TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * term - 1)
    return exponent.to(tl.float64) * _LN_2 + 2.0 * (s * series)


@triton.jit
def _horner(COEFFICIENTS: tl.constexpr, TERMS: tl.constexpr, x):
    value = tl.zeros_like(x) + COEFFICIENTS[0]
    for i in tl.static_range(1, TERMS):
        value = value * x + COEFFICIENTS[i]
    return value


@triton.jit
def _quantile(p):
    """Quantile of the standard normal distribution, float64."""
    upper = p > 1.0 - _TAIL
    q = tl.sqrt(-2.0 * _logarithm(tl.where(upper, 1.0 - p, p)))
    tail = _horner(_TAIL_C, 6, q) / (_horner(_TAIL_D, 4, q) * q + 1.0)
    centred = p - 0.5
    r = centred * centred
    centre = _horner(_CENTRE_A, 6, r) * centred / (_horner(_CENTRE_B, 5, r) * r + 1.0)
    return tl.where(p < _TAIL, tail, tl.where(upper, -tail, centre))


@triton.jit
def _first_values(
    init_seeds, init_modes, init_parameters, keys, tables, mask, COLUMNS: tl.constexpr, NORMAL: tl.constexpr
):  # fmt: skip
    """float32 [R, COLUMNS], the rows that ``keys`` begin with. NORMAL: whether any table takes the quantile."""
    seeds = tl.load(init_seeds + tables, mask=mask, other=0).to(tl.uint64, bitcast=True)[:, None]
    modes = tl.load(init_modes + tables, mask=mask, other=_CONSTANT)[:, None]
    parameters = init_parameters + tables * 4
    p0 = tl.load(parameters, mask=mask, other=0.0)[:, None]
    p1 = tl.load(parameters + 1, mask=mask, other=0.0)[:, None]
    bits = keys.to(tl.uint64, bitcast=True)[:, None]
    blocks = tl.zeros_like(bits).to(tl.uint32) + tl.arange(0, COLUMNS // 4).to(tl.uint32)[None, :]
    zeros = tl.zeros_like(blocks)
    x0, x1, x2, x3 = _philox(
        bits.to(tl.uint32) + zeros, (bits >> 32).to(tl.uint32) + zeros, blocks, zeros,
        seeds.to(tl.uint32) + zeros, (seeds >> 32).to(tl.uint32) + zeros,
    )  # fmt: skip
    words = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    u = (words.to(tl.float64) + 0.5) * _TWO_TO_MINUS_32

    values = p0 + (p1 - p0) * u
    if NORMAL:
        normal = (modes == _NORMAL) | (modes == _TRUNCATED_NORMAL)
        if tl.max(normal.to(tl.int32)) > 0:
            p2 = tl.load(parameters + 2, mask=mask, other=0.0)[:, None]
            p3 = tl.load(parameters + 3, mask=mask, other=0.0)[:, None]
            p = tl.where(modes == _TRUNCATED_NORMAL, p2 + (p3 - p2) * u, u)
            values = tl.where(normal, p0 + p1 * _quantile(p), values)
    values = tl.where(modes == _CONSTANT, p0, values)
    remainder = keys % _DEBUG_MODULUS
    remainder = tl.where(remainder < 0, remainder + _DEBUG_MODULUS, remainder)[:, None].to(tl.float64)
    return tl.where(modes == _DEBUG, remainder, values).to(tl.float32)


@triton.jit
def _is_new(outcome):
    return (outcome == _INSERTED) | (outcome == _REPLACED)


@triton.jit(do_not_specialize=["chunks"])
def _fill_kernel(
    addresses, count, keys, tables, slots, status, init_seeds, init_modes, init_parameters, init_states, chunks,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, DTYPE: tl.constexpr,
    STATE_OFFSET: tl.constexpr, STATE_WIDTH: tl.constexpr, STATE_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    NORMAL: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    tile = tl.program_id(0).to(tl.int64) * TILE
    while tile < entries:
        outcomes = tl.load(status + tile + tl.arange(0, TILE), mask=tile + tl.arange(0, TILE) < entries, other=0)
        end = tl.where(tl.max(_is_new(outcomes).to(tl.int32), axis=0) > 0, tl.minimum(tile + TILE, entries), tile)
        first = tile
        while first < end:
            entry = first + tl.arange(0, ROWS)
            new = _is_new(tl.load(status + entry, mask=entry < entries, other=0))
            if tl.max(new.to(tl.int32), axis=0) > 0:
                key = tl.load(keys + entry, mask=new, other=0)
                table = tl.load(tables + entry, mask=new, other=0)
                slot = tl.load(slots + entry, mask=new, other=0)
                values = _first_values(init_seeds, init_modes, init_parameters, key, table, new, COLUMNS, NORMAL)
                columns = tl.arange(0, COLUMNS)
                rows = row_pointers(addresses, chunks, slot, new, ROW_BYTES, DTYPE)
                write_row(rows[:, None] + columns[None, :], values, new[:, None] & (columns < DIM)[None, :], DTYPE)
                if STATE_WIDTH > 0:
                    columns = tl.arange(0, STATE_COLUMNS)
                    states = state_pointers(addresses, chunks, slot, new, ROW_BYTES, STATE_OFFSET)
                    begin = tl.load(init_states + table, mask=new, other=0.0)[:, None]
                    begin += tl.zeros([1, STATE_COLUMNS], tl.float32)
                    mask = new[:, None] & (columns < STATE_WIDTH)[None, :]
                    tl.store(states[:, None] + columns[None, :], begin, mask=mask)
            first += ROWS
        tile += tl.num_programs(0).to(tl.int64) * TILE


@triton.jit(do_not_specialize=["total"])
def _fill_missing_kernel(
    out, keys, tables, slots, init_seeds, init_modes, init_parameters, total, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64) * TILE
    while tile < total:
        seen = tl.load(slots + tile + tl.arange(0, TILE), mask=tile + tl.arange(0, TILE) < total, other=0)
        end = tl.where(tl.min(seen, axis=0) < 0, tl.minimum(tile + TILE, total), tile)
        first = tile
        while first < end:
            at = first + tl.arange(0, ROWS)
            missing = tl.load(slots + at, mask=at < total, other=0) < 0
            if tl.max(missing.to(tl.int32), axis=0) > 0:
                key = tl.load(keys + at, mask=missing, other=0)
                table = tl.load(tables + at, mask=missing, other=0)
                values = _first_values(init_seeds, init_modes, init_parameters, key, table, missing, COLUMNS, NORMAL)
                columns = tl.arange(0, COLUMNS)
                mask = missing[:, None] & (columns < DIM)[None, :]
                tl.store(out + (at * DIM)[:, None] + columns[None, :], rounded_to(values, DTYPE), mask=mask)
            first += ROWS
        tile += tl.num_programs(0).to(tl.int64) * TILE


def _tiles(dim: int, init: InitializerView) -> tuple[int, int, LaunchOptions]:
    """Rows that a program writes at a time, entries that it looks at together, and how it is compiled."""
    rows = row_tile(dim, warps=_WARPS)
    registers = _REGISTERS
    if init.any_normal:
        registers = _NORMAL_REGISTERS if rows == 1 else _NARROW_NORMAL_REGISTERS
    return rows, max(rows, _TILE), LaunchOptions(row_warps(dim, warps=_WARPS), registers, enable_fp_fusion=False)


def fill(view: GroupView, unique: UniqueKeys, slots: torch.Tensor, status: torch.Tensor, init: InitializerView) -> None:
    layout = view.layout
    rows, tile, options = _tiles(layout.dim, init)
    programs = grid_stride_programs(triton.cdiv(unique.keys.numel(), tile), slots, options)
    launch(
        _fill_kernel, programs, view.addresses, unique.count, unique.keys, unique.tables, slots,
        status, init.seeds, init.modes, init.parameters, init.states, view.addresses.shape[1], DIM=layout.dim,
        COLUMNS=column_tile(layout.dim), ROWS=rows, ROW_BYTES=layout.row_bytes,
        DTYPE=DTYPE_CODES[layout.embedding_dtype], STATE_OFFSET=layout.state_offset_bytes,
        STATE_WIDTH=layout.state_width, STATE_COLUMNS=column_tile(max(layout.state_width, 1)),
        TILE=tile, NORMAL=init.any_normal, options=options,
    )  # fmt: skip


def fill_missing(
    rows: torch.Tensor, keys: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, init: InitializerView,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    total, dim = rows.shape
    rows_at_once, tile, options = _tiles(dim, init)
    launch(
        _fill_missing_kernel, grid_stride_programs(triton.cdiv(total, tile), slots, options), rows, aligned(keys),
        aligned(tables), aligned(slots), init.seeds, init.modes, init.parameters, total, DIM=dim,
        COLUMNS=column_tile(dim), ROWS=rows_at_once, DTYPE=DTYPE_CODES[dtype], TILE=tile, NORMAL=init.any_normal,
        options=options,
    )  # fmt: skip
