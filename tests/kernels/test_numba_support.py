"""What all Numba kernels are built of."""

from __future__ import annotations

import re

import numba
import numpy as np
import pytest

from dynamicemb.kernels.numba_support import as_int64, inline, kernel, stack_bytes


@inline
def _sum(row):  # type: ignore[no-untyped-def]
    total = 0.0
    for value in row:
        total += value
    return total


def _sums(rows, totals):  # type: ignore[no-untyped-def]
    for i in range(totals.size):
        totals[i] = _sum(rows[i])


def test_no_references_are_counted() -> None:
    """An atomic addition and a subtraction for each array that a function is given, in each row of a batch."""
    compiled, totals = kernel(_sums), np.empty(3)
    compiled._cache = numba.core.caching.NullCache()  # what comes from a cache cannot be looked into
    compiled(np.arange(6.0).reshape(3, 2), totals)
    assert totals.tolist() == [1.0, 5.0, 9.0]
    (assembly,) = compiled.inspect_asm().values()
    assert "_sums" in assembly and not re.search(r"\block\b|NRT_", assembly)


def test_memory_of_the_stack() -> None:
    @kernel
    def write(out):  # type: ignore[no-untyped-def]
        first, second = as_int64(stack_bytes(24)), as_int64(stack_bytes(8))
        second[0] = 7
        for i in range(3):
            first[i] = i
        out[0], out[1], out[2] = stack_bytes(8) % 64, first[2], second[0]

    out = np.empty(3, np.int64)
    write(out)
    assert out.tolist() == [0, 2, 7]


def test_memory_of_the_stack_has_a_constant_size() -> None:
    @kernel
    def write(size, out):  # type: ignore[no-untyped-def]
        out[0] = stack_bytes(size)

    with pytest.raises(numba.errors.TypingError):
        write(np.int64(8), np.empty(1, np.int64))
