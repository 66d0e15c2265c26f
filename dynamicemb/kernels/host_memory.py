"""Memory of the CPU engine: large blocks begin where a huge page does, and NumPy asks the system for such pages.

The first access to a page costs a fault, with small pages longer than it takes to fill them; later ones at random cost
the way to the page as well, with small pages as long as the access itself. Where the system has no huge pages or gives
none, everything works with small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

__all__ = ["empty_rows", "zeroed_bytes"]

_HUGE_PAGE_BYTES = 2 << 20
_CACHE_LINE_BYTES = 64
#: From here on a block has a huge page of its own wherever it begins.
_LARGE_BYTES = 2 * _HUGE_PAGE_BYTES


def _aligned(make: Callable[..., np.ndarray], num_bytes: int) -> np.ndarray:
    """uint8 [num_bytes] made by ``make``, at a multiple of a huge page's size, or of a cache line's if it is small."""
    alignment = _HUGE_PAGE_BYTES if num_bytes >= _LARGE_BYTES else _CACHE_LINE_BYTES
    try:
        memory = make(num_bytes + alignment, np.uint8)
    except ValueError as error:  # NumPy's word for more bytes than 63 bits count
        raise MemoryError(str(error)) from error
    first = -memory.ctypes.data % alignment
    return memory[first : first + num_bytes]


def zeroed_bytes(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, at a multiple of 64. Large ones are not written to, so that they take memory as they
    are used, in huge pages where the system has them.

    Raises:
        MemoryError: there is no room.
    """
    return torch.from_numpy(_aligned(np.zeros, num_bytes))


def empty_rows(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[rows, dim], undefined, at a multiple of 64; large ones in huge pages where the system has them."""
    num_bytes = rows * dim * dtype.itemsize
    if num_bytes < _LARGE_BYTES:
        return torch.empty(rows, dim, dtype=dtype)
    memory = torch.from_numpy(_aligned(np.empty, num_bytes)).untyped_storage()
    # No view of the bytes: autograd lets nobody change a view that a function of ours has returned.
    return torch.empty(0, dtype=dtype).set_(memory, 0, (rows, dim))  # type: ignore[call-overload]
