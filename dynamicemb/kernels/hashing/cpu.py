"""Mixing, owners and places of keys on the CPU; the functions that every other CPU kernel is built on."""

from __future__ import annotations

import numpy as np
import torch

from dynamicemb.kernels.hashing import GOLDEN_GAMMA, MIX_FACTOR_1, MIX_FACTOR_2
from dynamicemb.kernels.layout import CHUNK_SHIFT, MAX_CHUNKS
from dynamicemb.kernels.numba_support import inline, kernel, mulhi64, parallel_for

_GAMMA = np.uint64(GOLDEN_GAMMA)
_FACTOR_1 = np.uint64(MIX_FACTOR_1)
_FACTOR_2 = np.uint64(MIX_FACTOR_2)
_30, _27, _31, _16 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(16)
_LOW_16, _255, _0, _1 = np.uint64(0xFFFF), np.uint64(255), np.uint64(0), np.uint64(1)
_CHUNK_SHIFT = np.int64(CHUNK_SHIFT)
_OFFSET_MASK = np.int64((1 << CHUNK_SHIFT) - 1)
_MAX_CHUNKS = np.int64(MAX_CHUNKS)


@inline
def mix(key):
    x = np.uint64(key) + _GAMMA
    x = (x ^ (x >> _30)) * _FACTOR_1
    x = (x ^ (x >> _27)) * _FACTOR_2
    return x ^ (x >> _31)


@inline
def digest_of(mixed):
    return np.uint8((((mixed & _LOW_16) * _255) >> _16) + _1)


@inline
def bucket_of(mixed, world_size, max_buckets, shift):
    """Bucket at the table's present size; uint64 throughout."""
    return mulhi64(mixed * world_size, max_buckets) >> shift


@inline
def place_of(bucket, levels):
    """(chunk of the table, index in the chunk) of a bucket."""
    low = bucket & ((_1 << levels) - _1)
    if low == _0:
        return np.int64(0), np.int64(bucket >> levels)
    zeros = _0
    while low & _1 == _0:
        low >>= _1
        zeros += _1
    return np.int64(levels - zeros), np.int64(bucket >> (zeros + _1))


@inline
def chunk_of(slot):
    return slot >> _CHUNK_SHIFT


@inline
def offset_of(slot):
    return slot & _OFFSET_MASK


@inline
def slot_handle(table, chunk, index):
    return ((np.int64(table) * _MAX_CHUNKS + chunk) << _CHUNK_SHIFT) | index


@kernel
def _mix64(start, stop, keys, out):
    for i in range(start, stop):
        out[i] = np.int64(mix(keys[i]))


@kernel
def _owners(start, stop, keys, world_size, out):
    for i in range(start, stop):
        out[i] = np.int64(mulhi64(mix(keys[i]), world_size))


def mix64(keys: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(keys)
    parallel_for(_mix64, keys.numel(), keys.numpy(), out.numpy())
    return out


def owners(keys: torch.Tensor, world_size: int) -> torch.Tensor:
    out = torch.empty_like(keys)
    parallel_for(_owners, keys.numel(), keys.numpy(), np.uint64(world_size), out.numpy())
    return out


@kernel
def _buckets(start, stop, keys, world_size, max_buckets, shift, out):
    for i in range(start, stop):
        out[i] = np.int64(bucket_of(mix(keys[i]), world_size, max_buckets, shift))


def buckets(keys: torch.Tensor, world_size: int, max_buckets: int, shift: int) -> torch.Tensor:
    out = torch.empty_like(keys)
    numbers = np.uint64(world_size), np.uint64(max_buckets), np.uint64(shift)
    parallel_for(_buckets, keys.numel(), keys.numpy(), *numbers, out.numpy())
    return out
