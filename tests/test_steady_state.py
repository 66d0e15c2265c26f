"""The recorder itself: what waits is noticed, what does not is let through, and kernels are told from views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from dynamicemb.kernels.launch import launch
from tests.steady_state import META, recorded

ROWS = torch.zeros(3, 4, device=META)
IDS = torch.zeros(5, dtype=torch.int64, device=META)
Call = Callable[[], Any]

#: Reads of the device's memory: each raises, also where nothing looks.
READS: dict[str, Call] = {
    "a number": lambda: ROWS[0, 0].item(),
    "a condition": lambda: bool(ROWS[0, 0] > 0),
    "a list": lambda: IDS.tolist(),
    "a host tensor": lambda: IDS.cpu(),
    "an array": lambda: IDS.numpy(),
    "where a mask is set": lambda: ROWS.nonzero(),
    "rows by a mask": lambda: ROWS[ROWS[:, 0] > 0],
    "values by a mask": lambda: ROWS.masked_select(ROWS > 0),
    "distinct values": lambda: IDS.unique(),
    "a count of each value": lambda: IDS.bincount(),
    "repetitions of unknown number": lambda: IDS.repeat_interleave(IDS),
    "a comparison": lambda: torch.equal(IDS, IDS),
    "pieces of sizes on the device": lambda: torch.tensor_split(ROWS, IDS),
}
#: Copies from the host, none of which raises.
COPIES: dict[str, Call] = {
    "of a tensor": lambda: torch.zeros(3).to(META),
    "that need not be waited for": lambda: torch.zeros(3).to(META, non_blocking=True),
    "into a tensor": lambda: ROWS.copy_(torch.zeros(3, 4)),
    "of numbers": lambda: torch.tensor([1, 2], device=META),
    "of a number": lambda: torch.as_tensor(1, device=META),
    "of numbers like others": lambda: IDS.new_tensor([1, 2]),
    "of a list of rows": lambda: ROWS[[0, 2]],
    "of positions": lambda: ROWS[torch.zeros(2, dtype=torch.int64)],
    "of a number into an element": lambda: ROWS.__setitem__((1, 2), 3.0),
}
#: What a step does instead.
HARMLESS: dict[str, Call] = {
    "repetitions of known number": lambda: IDS.repeat_interleave(IDS, output_size=7),
    "a choice by a mask": lambda: torch.where(ROWS > 0, ROWS, 0.0),
    "a number": lambda: ROWS[1, 2].fill_(3.0),
    "rows": lambda: ROWS[1:, ::2] + ROWS.index_select(0, IDS).sum(),
    "pieces": lambda: torch.cat(ROWS.split([1, 2])),
    "a table": lambda: torch.full((3,), 2.0, device=META),
    "numbers of the host only": lambda: sum(ROWS.shape),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_raises(name: str) -> None:
    with recorded(), pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        READS[name]()


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_from_the_host_is_noticed(name: str) -> None:
    with recorded() as step:
        COPIES[name]()
    assert step.waits


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_wait_is_let_through(name: str) -> None:
    with recorded() as step:
        HARMLESS[name]()
    assert step.waits == []


def test_reads_are_noticed_on_real_tensors_too() -> None:
    """Where they do not raise."""
    ids = torch.arange(3)
    with recorded() as step:
        ids.sum().item(), ids[ids > 1], ids.unique(), ids.repeat_interleave(ids), ids.nonzero()
    assert len(step.waits) == 5


def test_a_backward_pass_is_looked_at() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values + 1

        @staticmethod
        def backward(ctx: Any, gradients: torch.Tensor) -> torch.Tensor:
            return gradients * torch.tensor(2.0, device=META)

    values = torch.empty(3, device=META, requires_grad=True)
    with recorded() as step:
        Reads.apply(values).backward(torch.empty(3, device=META))
    assert step.waits == ["tensor"] and "aten.mul.Tensor" in step.kernels


@triton.jit
def _two_kernel(values) -> None:
    return


def test_kernels_are_told_from_views_and_memory() -> None:
    with recorded() as step:
        for piece in ROWS.view(4, 3).t()[1:].unbind():
            piece.detach().unsqueeze(0)
        torch.empty_like(ROWS).new_empty(3)
        assert step.kernels == []
        torch.add(ROWS, 1, out=torch.empty_like(ROWS))
        launch(_two_kernel, 1, ROWS)
        ROWS.t().contiguous()
        ROWS.mul_(2)
    assert step.kernels == ["aten.add.out", "triton._two_kernel", "aten.clone.default", "aten.mul_.Tensor"]
