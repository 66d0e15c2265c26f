"""The ids of a batch in a dtype that torchrec can move about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.errors import KeyTypeError

__all__ = ["with_integer_ids"]


def with_integer_ids(features: KeyedJaggedTensor, tables: Sequence[str]) -> KeyedJaggedTensor:
    """``features`` with ids that are int64 or int32, before torchrec's operators, which take no others, see them.

    uint64 is reinterpreted; where there are no ids, they become int64.

    Args:
        features: a batch of this rank.
        tables: dynamic tables that it is for, for the message.

    Raises:
        KeyTypeError: the ids are not integers of 32 or 64 bits.
    """
    values = features.values()
    if values.dtype in (torch.int64, torch.int32):
        return features
    if values.dtype is torch.uint64:
        return _replaced(features, values.contiguous().view(torch.int64), features.length_per_key_or_none())
    if values.numel() > 0:
        raise KeyTypeError(
            f"tables {', '.join(tables)}: the ids of features {', '.join(features.keys())} are {values.dtype}, but "
            "dynamic tables take int64, int32 or uint64; convert them before building the KeyedJaggedTensor"
        )
    no_ids = torch.empty(0, dtype=torch.int64, device=values.device)
    return _replaced(features, no_ids, [0] * len(features.keys()))


def _replaced(
    features: KeyedJaggedTensor, values: torch.Tensor, length_per_key: Optional[list[int]]
) -> KeyedJaggedTensor:
    variable_stride = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        stride=None if variable_stride else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable_stride else None,
        length_per_key=length_per_key,  # torchrec would ask the device again
        inverse_indices=features.inverse_indices_or_none(),
    )
