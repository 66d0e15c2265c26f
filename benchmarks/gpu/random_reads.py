"""Reads of a few bytes at random places: the rate at which memory answers, whatever is asked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamicemb.kernels.launch import LaunchOptions, launch

__all__ = ["PROGRAM_WORDS", "WARPS", "launched_reads", "places_read", "random_read_kernel", "random_reads"]

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_FACTOR = 0xD6E8FEB86659FD93
_ODD_FACTOR = tl.constexpr(_ODD)
_MIX_FACTOR = tl.constexpr(_FACTOR)

#: Words of 8 bytes that one program reads: eight loads under way in each of its 128 threads.
PROGRAM_WORDS = 1024
WARPS = 4


@triton.jit(do_not_specialize=["places", "salt"])
def random_read_kernel(words, sums, places, salt, READS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """READS reads of WIDTH neighbouring words each, at places that follow from the number of the read and ``salt``."""
    read = tl.program_id(0).to(tl.int64) * READS + tl.arange(0, READS)
    h = (read + salt).to(tl.uint64, bitcast=True) * _ODD_FACTOR
    h = (h ^ (h >> 32)) * _MIX_FACTOR
    place = tl.umulhi(h, places.to(tl.uint64)).to(tl.int64)
    at = (place * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    total = tl.sum(tl.sum(tl.load(words + at), axis=1), axis=0)
    tl.store(sums + tl.program_id(0), total)


def places_read(reads: int, places: int, salt: int) -> torch.Tensor:
    """int64 [reads], where the kernel reads, computed in Python."""
    result = []
    for read in range(salt * reads, (salt + 1) * reads):
        h = read * _ODD & _MASK
        h = (h ^ (h >> 32)) * _FACTOR & _MASK
        result.append((h * places) >> 64)
    return torch.tensor(result, dtype=torch.int64)


def launched_reads(words: torch.Tensor, width: int, reads: int, salt: int) -> torch.Tensor:
    """As :func:`random_reads`, by the kernel wherever ``words`` are."""
    programs = reads * width // PROGRAM_WORDS
    sums = torch.empty(programs, dtype=torch.int64, device=words.device)
    launch(
        random_read_kernel, programs, words, sums, words.numel() // width, salt * reads,
        options=LaunchOptions(num_warps=WARPS), READS=PROGRAM_WORDS // width, WIDTH=width,
    )  # fmt: skip
    return sums


def random_reads(words: torch.Tensor, width: int, reads: int, salt: int) -> torch.Tensor:
    """Reads ``reads`` times ``width`` neighbouring words at random places that are multiples of ``width``.

    Args:
        words: int64 [W].
        width: words of a read: 1, 4, 8 or 16.
        reads: a multiple of ``PROGRAM_WORDS // width``.
        salt: which places; different ones for different values.

    Returns:
        int64 [reads * width // PROGRAM_WORDS], sums of what was read. On host tensors, PyTorch does the same work at
        other places, for a dry run. Does not synchronise.
    """
    if words.device.type != "cpu":
        return launched_reads(words, width, reads, salt)
    generator = torch.Generator().manual_seed(salt)
    places = torch.randint(words.numel() // width, (reads,), generator=generator)
    return words.view(-1, width).index_select(0, places).view(reads * width // PROGRAM_WORDS, -1).sum(1)
