"""Runs of equal numbers, written out by hand, for the tests of both engines."""

from __future__ import annotations

import torch

from dynamicemb.kernels.repeat import repeat

__all__ = ["LENGTHS", "assert_repeated"]

LENGTHS = {
    "none": [],
    "one empty": [0],
    "all empty": [0, 0, 0],
    "one": [1],
    "even": [3] * 26,
    "some empty": [0, 5, 0, 0, 1, 2, 0],
    "borders": [1023, 1, 1024, 1025, 0, 2048],
    "one long": [1, 1, 10_000, 1],
    "many": [number % 3 for number in range(1500)],
}


def assert_repeated(lengths: list[int], device: str) -> None:
    """Values are the runs' numbers counted down; lengths begin where a launch would not have them."""
    values = torch.arange(len(lengths), 0, -1, dtype=torch.int32, device=device)
    given = torch.tensor([7, *lengths], dtype=torch.int64, device=device)[1:]
    expected = [len(lengths) - run for run, length in enumerate(lengths) for _ in range(length)]
    result = repeat(values, given, len(expected))
    assert result.dtype is torch.int32 and result.tolist() == expected
