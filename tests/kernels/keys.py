"""Keys that hash tables meet and dislike, and a measure of how evenly they are spread."""

from __future__ import annotations

import random
from typing import Optional

import torch

from tests import oracle

EXTREME_KEYS = (
    -(2**63), -(2**63) + 1, -(2**32), -(2**31), -4, -3, -2, -1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**62, 2**63 - 2, 2**63 - 1,
)  # fmt: skip

_COUNT = 100_000
#: int64 [100000] each: ids as they come from databases, clocks, enumerations and packed fields.
STRUCTURED_KEYS = {
    "small": torch.arange(_COUNT),
    "negative": -torch.arange(_COUNT),
    "multiples of 8": torch.arange(_COUNT) * 8,
    "multiples of 2**32": torch.arange(_COUNT) << 32,
    "multiples of 2**47": torch.arange(_COUNT) << 47,
    "seconds": 1_700_000_000 + torch.arange(_COUNT),
    "milliseconds": 1_700_000_000_123 + torch.arange(_COUNT) * 1000,
    "two fields": (torch.arange(_COUNT) % 317 << 40) | torch.arange(_COUNT) // 317,
}


def chi_square_sigmas(counts: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic of ``counts`` lies above that of an even spread."""
    expected = counts.sum().item() / counts.numel()
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (statistic - freedom) / (2.0 * freedom) ** 0.5


def random_key(generator: random.Random) -> int:
    """Any 64 bits."""
    return oracle.signed(generator.getrandbits(64))


def key_pool(generator: random.Random, size: int, rank: int, world_size: int, colliding: Optional[int]) -> list[int]:
    """``size`` distinct keys of one rank: extremes, small and random ones, and crowds that share a bucket or a digest.

    ``colliding``: how many keys each of the two crowds has.
    """
    crowd = colliding or 0
    place = generator.random()
    pool = [
        *oracle.colliding_keys(rank, world_size, place, generator.getrandbits(16), crowd),
        *oracle.colliding_keys(rank, world_size, generator.random(), None, crowd),
    ]
    candidates = [*EXTREME_KEYS, *range(-20, 20)]
    while len(pool) < size:
        key = candidates.pop() if candidates else random_key(generator)
        if oracle.owner(key, world_size) == rank and key not in pool:
            pool.append(key)
    return pool
