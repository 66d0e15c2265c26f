"""The launcher of ranks: results by rank, and failures that name themselves and end at once."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_on_ranks


def add_up(rank: int, world_size: int, first: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = first + rank
    dist.all_reduce(total)
    return rank, total


def test_results_come_by_rank_and_by_value() -> None:
    results = run_on_ranks(3, add_up, torch.tensor([10, 20]))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(total.tolist() == [33, 63] for _, total in results)


def fail_on_one(rank: int, world_size: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("the reason")
    if rank == 1:
        os._exit(7)
    time.sleep(600)


@pytest.mark.parametrize(("how", "message"), [("raise", "rank 1 failed(.|\n)*the reason"), ("die", "exit codes .*7")])
def test_one_failure_ends_all(how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_on_ranks(2, fail_on_one, how)
