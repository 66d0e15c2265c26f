"""Mixing of keys and the owner of a key.

``mix64`` is the finalizer of SplitMix64 (Steele, Lea, Flood 2014; variant 13 of Stafford's mixers) after adding the
golden gamma: with ``x = key + 0x9e3779b97f4a7c15`` in unsigned 64-bit arithmetic,
``x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9``, ``x = (x ^ x >> 27) * 0x94d049bb133111eb``, ``h = x ^ x >> 31``.
It is a bijection, so no two keys share an ``h`` and the key can be recovered from it.

The digest of a key is ``((h & 0xffff) * 255 >> 16) + 1``, from 1 to 255: the other end of ``h`` than the bucket's bits.
"""

from __future__ import annotations

import torch

from dynamicemb.kernels.engine import host_implementation, implementation

__all__ = ["GOLDEN_GAMMA", "MIX_FACTOR_1", "MIX_FACTOR_2", "buckets", "mix64", "owner_range", "owners", "sortable"]

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_FACTOR_1 = 0xBF58476D1CE4E5B9
MIX_FACTOR_2 = 0x94D049BB133111EB
_SIGN_BIT = -(2**63)


def mix64(keys: torch.Tensor) -> torch.Tensor:
    """The mixed keys, as int64 with the bits of the unsigned ``h``.

    Args:
        keys: int64 [N].

    Returns:
        int64 [N]. Does not synchronise.
    """
    return implementation(__name__, keys.device).mix64(keys)


def owners(keys: torch.Tensor, world_size: int) -> torch.Tensor:
    """The rank that holds each key: ``hi64(h * world_size)``. The one routing rule, for input, loader and tools.

    Args:
        keys: int64 [N].
        world_size: ranks that share the table.

    Returns:
        int64 [N], from 0 to ``world_size - 1``. Does not synchronise.
    """
    return implementation(__name__, keys.device).owners(keys, world_size)


def sortable(mixed: torch.Tensor) -> torch.Tensor:
    """Numbers whose order is that of the mixed keys, which are unsigned, where torch only compares signed ones.

    Args:
        mixed: int64 [N], from :func:`mix64`.

    Returns:
        int64 [N]. Does not synchronise.
    """
    return mixed ^ _SIGN_BIT


def owner_range(rank: int, world_size: int) -> tuple[int, int]:
    """The mixed keys that :func:`owners` gives to ``rank``: unsigned, from the first number to before the second."""
    first, stop = (-(-number * 2**64 // world_size) for number in (rank, rank + 1))
    return first, stop


def buckets(keys: torch.Tensor, world_size: int, max_buckets: int, shift: int) -> torch.Tensor:
    """The bucket of each key on its owner, for what prepares rows on the host before they reach a table.

    Args:
        keys: int64 [N], in host memory whatever the engine.
        world_size: ranks that share the table.
        max_buckets, shift: the table's :class:`~dynamicemb.kernels.layout.TableGeometry`.

    Returns:
        int64 [N], from 0 on; monotone in the mixed key among the keys of one owner.
    """
    return host_implementation(__name__).buckets(keys, world_size, max_buckets, shift)
