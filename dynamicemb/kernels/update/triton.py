"""Optimizer steps on the GPU: the sum of a key's gradients stays in registers until its row has been changed.

One warp takes a key of up to 128 columns, or several narrower ones. Whole blocks of a frequent key's gradients have
been summed by then.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, grid_stride_programs, launch
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.rows_triton import (
    DTYPE_CODES,
    column_tile,
    float_view,
    read_row,
    row_pointers,
    row_tile,
    row_warps,
    state_pointers,
    sum_rows,
    sum_rows_registers,
    write_row,
)
from dynamicemb.kernels.segment_sum import BLOCK_ROWS
from dynamicemb.kernels.segment_sum.triton import SUM_BLOCK_REGISTERS, empty_block_sums, sum_block
from dynamicemb.kernels.steps.triton import advance_steps
from dynamicemb.kernels.triton_support import table_of
from dynamicemb.kernels.update import HyperparameterColumn, WeightDecayMode
from dynamicemb.kernels.views import GroupView, UniqueKeys

_SGD = tl.constexpr(int(OptimizerKind.SGD))
_ADAGRAD = tl.constexpr(int(OptimizerKind.ADAGRAD))
_ROWWISE_ADAGRAD = tl.constexpr(int(OptimizerKind.ROWWISE_ADAGRAD))
_ADAM = tl.constexpr(int(OptimizerKind.ADAM))
_L2 = tl.constexpr(int(WeightDecayMode.L2))
_DECOUPLE = tl.constexpr(int(WeightDecayMode.DECOUPLE))
_HYPERPARAMETERS = tl.constexpr(len(HyperparameterColumn))
_LEARNING_RATE = tl.constexpr(int(HyperparameterColumn.LEARNING_RATE))
_EPS = tl.constexpr(int(HyperparameterColumn.EPS))
_BETA1 = tl.constexpr(int(HyperparameterColumn.BETA1))
_BETA2 = tl.constexpr(int(HyperparameterColumn.BETA2))
_WEIGHT_DECAY = tl.constexpr(int(HyperparameterColumn.WEIGHT_DECAY))
# One warp for a key, so that none waits for another one's duplicates.
_WARPS, _THREADS = 1, 32
_HUNGRY_REGISTERS_AMPERE = 96
# Tables whose steps are counted together.
_TABLES = 32


@triton.jit
def _hyperparameter(hyperparameters, table, mask, COLUMN: tl.constexpr):
    """float64 [R, 1]"""
    return tl.load(hyperparameters + table * _HYPERPARAMETERS + COLUMN, mask=mask, other=1.0)[:, None]


@triton.jit(do_not_specialize=["num_tables", "some", "adam"])
def _begin_update_kernel(
    gradients, order, inverse, offsets, block_sums, steps, takes_step, hyperparameters, corrections, num_tables, some,
    adam, DIM: tl.constexpr, COLUMNS: tl.constexpr, GRADIENT_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    TABLES: tl.constexpr,
):  # fmt: skip
    """What an update needs before any row: the first program counts the step, the others sum whole blocks."""
    window = tl.program_id(0).to(tl.int64) - 1
    if window < 0:
        advance_steps(steps, takes_step, hyperparameters, corrections, num_tables, some, adam, TABLES)
    else:
        sum_block(gradients, order, inverse, offsets, block_sums, window, DIM, COLUMNS, GRADIENT_DTYPE, BLOCK)


@triton.jit(do_not_specialize=["chunks"])
def _update_kernel(
    addresses, count, slots, order, offsets, gradients, block_sums, hyperparameters, corrections, chunks,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, STATE_OFFSET: tl.constexpr,
    OPTIMIZER: tl.constexpr, DECAY_MODE: tl.constexpr, DTYPE: tl.constexpr, GRADIENT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    entries = tl.load(count)
    columns = tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < entries:
        # Memory is waited for three times: for offsets and slots, for positions, and for gradients; the rows and their
        # states are under way with the positions. Barriers keep loads before them from being moved down to where their
        # values are needed, which ptxas does when registers are few. They wait for no load. A program of one warp pays
        # a few cycles; a wide row's warps read its one state before the barrier, and one of them writes it after.
        entry = first + tl.arange(0, ROWS)
        inside = entry < entries
        begins = tl.load(offsets + entry, mask=inside, other=0)
        ends = tl.load(offsets + entry + 1, mask=inside, other=0)
        tl.debug_barrier()
        slot = tl.load(slots + entry, mask=inside, other=-1)
        active = slot >= 0
        ends = tl.where(active, ends, begins)
        table = table_of(slot)
        mask = active[:, None] & (columns < DIM)[None, :]
        rows = row_pointers(addresses, chunks, slot, active, ROW_BYTES, DTYPE)[:, None] + columns[None, :]
        state = state_pointers(addresses, chunks, slot, active, ROW_BYTES, STATE_OFFSET)
        states = state[:, None] + columns[None, :]
        weights = read_row(rows, mask, DTYPE)
        if OPTIMIZER == _ADAGRAD:
            total = tl.load(states, mask=mask, other=0.0)
        elif OPTIMIZER == _ROWWISE_ADAGRAD:
            total = tl.load(state, mask=active, other=0.0)
        elif OPTIMIZER == _ADAM:
            mean = tl.load(states, mask=mask, other=0.0)
            square = tl.load(states + DIM, mask=mask, other=0.0)
        tl.debug_barrier()
        gradient = sum_rows(gradients, order, block_sums, begins, ends, columns, DIM, GRADIENT_DTYPE, BLOCK)

        rate = _hyperparameter(hyperparameters, table, active, _LEARNING_RATE).to(tl.float32)
        eps = _hyperparameter(hyperparameters, table, active, _EPS).to(tl.float32)
        if DECAY_MODE == _L2:
            gradient += _hyperparameter(hyperparameters, table, active, _WEIGHT_DECAY).to(tl.float32) * weights
        elif DECAY_MODE == _DECOUPLE:
            decay = _hyperparameter(hyperparameters, table, active, _WEIGHT_DECAY).to(tl.float32)
            weights *= 1.0 - rate * decay

        if OPTIMIZER == _SGD:
            weights -= rate * gradient
        elif OPTIMIZER == _ADAGRAD:
            total += gradient * gradient
            tl.store(states, total, mask=mask)
            weights -= tl.div_rn(rate * gradient, tl.sqrt_rn(total) + eps)
        elif OPTIMIZER == _ROWWISE_ADAGRAD:
            squares = tl.sum(gradient * gradient, axis=1)
            total += tl.div_rn(squares, tl.full([ROWS], DIM, tl.float32))
            tl.store(state, total, mask=active)
            weights -= tl.div_rn(rate, tl.sqrt_rn(total)[:, None] + eps) * gradient
        else:
            beta1 = _hyperparameter(hyperparameters, table, active, _BETA1)
            beta2 = _hyperparameter(hyperparameters, table, active, _BETA2)
            correction1 = tl.load(corrections + table * 2, mask=active, other=1.0)[:, None]
            correction2 = tl.load(corrections + table * 2 + 1, mask=active, other=1.0)[:, None]
            new1, new2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
            mean = beta1.to(tl.float32) * mean + new1 * gradient
            square = beta2.to(tl.float32) * square + new2 * gradient * gradient
            tl.store(states, mean, mask=mask)
            tl.store(states + DIM, square, mask=mask)
            step = tl.div_rn(tl.div_rn(mean, correction1 + tl.zeros_like(mean)),
                             tl.sqrt_rn(tl.div_rn(square, correction2 + tl.zeros_like(square))) + eps)  # fmt: skip
            weights -= rate * step
        write_row(rows, weights, mask, DTYPE)
        first += tl.num_programs(0).to(tl.int64) * ROWS


def begin_update(
    unique: UniqueKeys,
    gradients: torch.Tensor,
    hyperparameters: torch.Tensor,
    steps: torch.Tensor,
    takes_step: Optional[torch.Tensor],
    adam: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts the step. Returns the sums of whole blocks and, for Adam, the bias corrections, float32 [T, 2]."""
    dim, num_tables, block_sums = gradients.shape[1], steps.numel(), empty_block_sums(gradients)
    options = LaunchOptions(row_warps(dim, warps=_WARPS), SUM_BLOCK_REGISTERS, enable_fp_fusion=False)
    corrections = torch.empty(num_tables if adam else 0, 2, dtype=torch.float32, device=steps.device)
    chosen = (steps if takes_step is None else takes_step).view(torch.uint8)
    launch(
        _begin_update_kernel, 1 + len(block_sums), float_view(gradients), unique.order, unique.inverse, unique.offsets,
        block_sums, steps, chosen, hyperparameters, corrections, num_tables, int(takes_step is not None), int(adam),
        DIM=dim, COLUMNS=column_tile(dim), GRADIENT_DTYPE=DTYPE_CODES[gradients.dtype], BLOCK=BLOCK_ROWS,
        TABLES=_TABLES, options=options,
    )  # fmt: skip
    return block_sums, corrections


def update(
    view: GroupView,
    unique: UniqueKeys,
    slots: torch.Tensor,
    gradients: torch.Tensor,
    hyperparameters: torch.Tensor,
    steps: torch.Tensor,
    weight_decay_mode: WeightDecayMode,
    takes_step: Optional[torch.Tensor],
) -> None:
    layout = view.layout
    entries = slots.numel()
    adam = layout.optimizer is OptimizerKind.ADAM
    block_sums, corrections = begin_update(unique, gradients, hyperparameters, steps, takes_step, adam)
    if entries == 0:
        return
    rows = row_tile(layout.dim, warps=_WARPS)
    registers = sum_rows_registers(layout.dim)
    # Adam where each thread has a row of its own, and converts it: Triton 3.9 spills on Ampere with 80 registers. With
    # 96, an SM has 20 warps of it there instead of 24.
    hungry = adam and rows == _THREADS and layout.embedding_dtype is not torch.float32
    ampere = _HUNGRY_REGISTERS_AMPERE if hungry else None
    warps = row_warps(layout.dim, warps=_WARPS)
    options = LaunchOptions(warps, registers, enable_fp_fusion=False, maxnreg_ampere=ampere)
    launch(
        _update_kernel, grid_stride_programs(triton.cdiv(entries, rows), slots, options), view.addresses, unique.count,
        slots, unique.order, unique.offsets, float_view(gradients), block_sums,
        hyperparameters, corrections, view.addresses.shape[1], DIM=layout.dim, COLUMNS=column_tile(layout.dim),
        ROWS=rows, ROW_BYTES=layout.row_bytes, STATE_OFFSET=layout.state_offset_bytes, OPTIMIZER=int(layout.optimizer),
        DECAY_MODE=int(weight_decay_mode), DTYPE=DTYPE_CODES[layout.embedding_dtype],
        GRADIENT_DTYPE=DTYPE_CODES[gradients.dtype], BLOCK=BLOCK_ROWS, options=options,
    )  # fmt: skip
