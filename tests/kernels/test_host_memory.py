"""Memory of the CPU engine: aligned, zero where it should be, taken page by page, in huge pages where there are any."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import pytest
import torch

from dynamicemb.kernels.host_memory import empty_rows, zeroed_bytes

MIB = 2**20
SMAPS = Path("/proc/self/smaps")


def mapped_kib(memory: torch.Tensor, field: str) -> int:
    """A size of the mapping that the middle of ``memory`` lies in."""
    place, inside = memory.data_ptr() + memory.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= place < int(bounds[2], 16)
        elif inside and line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(f"no mapping with {field}")


@pytest.mark.parametrize("num_bytes", [0, 8, 1000, 4 * MIB - 8, 4 * MIB, 9 * MIB + 8])
def test_bytes_are_zero_and_aligned(num_bytes: int) -> None:
    for _ in range(2):  # the second may get what the first gave back
        memory = zeroed_bytes(num_bytes)
        assert memory.dtype == torch.uint8 and memory.shape == (num_bytes,) and not memory.any()
        assert memory.untyped_storage().nbytes() == num_bytes
        assert memory.data_ptr() % (64 if num_bytes < 4 * MIB else 2 * MIB) == 0
        memory.fill_(255)


@pytest.mark.parametrize(("rows", "dim"), [(0, 4), (3, 20), (40_000, 64)])
def test_rows_are_aligned(rows: int, dim: int) -> None:
    result = empty_rows(rows, dim)
    assert result.dtype == torch.float32 and result.shape == (rows, dim) and result.is_contiguous()
    assert result.data_ptr() % 64 == 0
    result.fill_(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 80_000])
def test_rows_are_no_view(rows: int, dtype: torch.dtype) -> None:
    """Autograd lets nobody change a view in place that a function of its own has returned."""
    result = empty_rows(rows, 64, dtype)
    assert not result._is_view() and result.dtype == dtype
    kept = result.fill_(1.0)[-1]
    del result
    assert (kept == 1.0).all(), "the memory lives as long as any part of it"


def test_more_bytes_than_can_be_counted() -> None:
    for make in (zeroed_bytes, lambda num_bytes: empty_rows(num_bytes // 4, 1)):
        with pytest.raises(MemoryError):
            make(2**65)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc")
def test_unused_bytes_take_no_memory() -> None:
    memory = zeroed_bytes(64 * MIB)
    assert mapped_kib(memory, "Rss") < 4096
    memory[::4096] = 1
    assert 64 * 1024 <= mapped_kib(memory, "Rss") <= 66 * 1024


def gets_huge_pages(memory: torch.Tensor) -> bool:
    """Whether half of it at least is in huge pages once it is written to; not all, as memory may be in pieces."""
    memory[::4096] = 1
    return 2 * 1024 * mapped_kib(memory, "AnonHugePages") >= memory.nbytes


def system_gives_huge_pages() -> bool:
    """Asked with a mapping of our own, since a container may have none, whatever the settings say."""
    mapped = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # the kernel has none
        return False
    return gets_huge_pages(torch.frombuffer(mapped, dtype=torch.uint8))


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc")
def test_large_blocks_are_in_huge_pages() -> None:
    if os.environ.get("NUMPY_MADVISE_HUGEPAGE") == "0":
        pytest.skip("NUMPY_MADVISE_HUGEPAGE=0: NumPy is told not to ask for huge pages")
    if not system_gives_huge_pages():
        pytest.skip("the system gives a mapping that asks for huge pages none")
    assert gets_huge_pages(zeroed_bytes(64 * MIB))
