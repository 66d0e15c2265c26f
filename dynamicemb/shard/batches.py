"""Batches that contradict themselves or the collection: found before torchrec's operators, which trust them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.errors import DataError, DynamicEmbError, KeyTypeError
from dynamicemb.shard.ids import with_integer_ids

__all__ = ["served"]

_LENGTH_DTYPES = (torch.int64, torch.int32)


def served(
    features: KeyedJaggedTensor, needed: Sequence[str], tables: Sequence[str], device: torch.device
) -> tuple[KeyedJaggedTensor, Optional[DynamicEmbError]]:
    """A batch as torchrec and the tables can take it, or what stands for it and the error to raise on all ranks.

    Asks the device for nothing that torchrec does not ask it for next: how many ids each feature has. In host memory
    each length is looked at; on a device, a negative one is noticed where it shows in the sum of its feature.

    Args:
        features: a batch of this rank.
        needed: features of the collection's tables.
        tables: dynamic tables that it is for, for the message.
        device: where the tables are.

    Returns:
        The batch and None; or, for one that contradicts itself or has ids that are no integers, one sample without ids,
        with which this rank takes part in the exchanges, and the error.
    """
    fault = _fault_of_keys(features, needed) or _fault_of_shapes(features, device) or _fault_of_lengths(features)
    if fault is not None:
        return _no_ids(features, needed, device), DataError(f"a batch for tables {', '.join(tables)}: {fault}")
    try:
        return with_integer_ids(features, tables), None
    except KeyTypeError as error:
        return _no_ids(features, needed, device), error


def _no_ids(features: KeyedJaggedTensor, needed: Sequence[str], device: torch.device) -> KeyedJaggedTensor:
    keys = features.keys() if _fault_of_keys(features, needed) is None else list(needed)
    weights = features.weights_or_none()
    # In the dtypes of the batch, which are those of the other ranks: torchrec exchanges static ids as they are.
    ids, lengths = (
        tensor.dtype if tensor.dtype is torch.int32 else torch.int64
        for tensor in (features.values(), features.lengths())
    )
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(0, dtype=ids, device=device),
        weights=None if weights is None else torch.empty(0, dtype=weights.dtype, device=device),
        lengths=torch.zeros(len(keys), dtype=lengths, device=device),
        stride=1,
        length_per_key=[0] * len(keys),  # torchrec would ask the device
    )


def _fault_of_keys(features: KeyedJaggedTensor, needed: Sequence[str]) -> Optional[str]:
    keys = features.keys()
    present = set(keys)
    if missing := sorted(name for name in needed if name not in present):
        return f"it lacks the features {', '.join(missing)}; it has {', '.join(keys) or 'none'}"
    if len(present) < len(keys) and (twice := [name for name in needed if keys.count(name) > 1]):
        return f"it has the features {', '.join(twice)} more than once"
    return None


def _is_same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index == other.index or None in (one.index, other.index))


def _fault_of_shapes(features: KeyedJaggedTensor, device: torch.device) -> Optional[str]:
    values, lengths, weights = features.values(), features.lengths(), features.weights_or_none()
    for name, tensor in (("ids", values), ("lengths", lengths)):
        if tensor.dim() != 1:
            return f"its {name} have the shape {tuple(tensor.shape)}, but only one dimension is possible; flatten them"
        if not _is_same(tensor.device, device):
            return f"its {name} are on {tensor.device}, but the tables are on {device}; move the batch with .to()"
    if lengths.dtype not in _LENGTH_DTYPES:
        return f"its lengths are {lengths.dtype}, but int64 or int32 are possible"
    samples = sum(features.stride_per_key())
    if lengths.numel() != samples:
        return (
            f"it has {lengths.numel()} lengths for {len(features.keys())} features ({', '.join(features.keys())}), "
            f"but {samples} samples; every feature has a length for each of its samples, which may be 0"
        )
    if weights is not None and weights.shape[:1] != values.shape:
        return f"it has {len(weights)} weights for {values.numel()} ids; every id has a weight, or none has"
    return None


def _fault_of_lengths(features: KeyedJaggedTensor) -> Optional[str]:
    sums, ids = features.length_per_key(), features.values().numel()
    negative = _features_with_negative_lengths(features, sums)
    if not negative and sum(sums) == ids:
        return None
    by_feature = ", ".join(f"{name} {count}" for name, count in zip(features.keys(), sums, strict=True))
    if negative:
        return (
            f"features {', '.join(negative)} have negative lengths; the lengths of each feature add up to {by_feature}"
        )
    return (
        f"its lengths add up to {sum(sums)}, but it has {ids} ids; every id belongs to one sample of one feature. The "
        f"lengths of each feature add up to {by_feature}"
    )


def _features_with_negative_lengths(features: KeyedJaggedTensor, sums: list[int]) -> list[str]:
    lengths = features.lengths()
    least = sums
    if lengths.is_cpu and lengths.numel() > 0:
        if int(lengths.min()) >= 0:
            return []
        by_feature = lengths.split(features.stride_per_key())
        least = [int(part.min()) if part.numel() else 0 for part in by_feature]
    return [name for name, number in zip(features.keys(), least, strict=True) if number < 0]
