"""The ids of a batch in a dtype that torchrec can move about, or the error that all ranks hear of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.errors import KeyTypeError

__all__ = ["with_integer_ids"]


def with_integer_ids(
    features: KeyedJaggedTensor, tables: Sequence[str]
) -> tuple[KeyedJaggedTensor, Optional[KeyTypeError]]:
    """``features`` with ids that are int64 or int32, before torchrec's operators, which take no others, see them.

    Args:
        features: a batch of this rank.
        tables: dynamic tables that it is for, for the message.

    Returns:
        The batch (uint64 reinterpreted; int64 where there are no ids) and None. If the ids are not integers of 32 or 64
        bits: the batch without its ids, so that this rank can take part in the exchanges, and the error to raise.
    """
    values = features.values()
    if values.dtype in (torch.int64, torch.int32):
        return features, None
    if values.dtype is torch.uint64:
        length_per_key = features.length_per_key_or_none()
        return _replaced(features, values.contiguous().view(torch.int64), features.lengths(), length_per_key), None
    error = None
    if values.numel() > 0:
        error = KeyTypeError(
            f"tables {', '.join(tables)}: the ids of features {', '.join(features.keys())} are {values.dtype}, but "
            "dynamic tables take int64, int32 or uint64; convert them before building the KeyedJaggedTensor"
        )
    no_ids = torch.empty(0, dtype=torch.int64, device=values.device)
    no_lengths = torch.zeros_like(features.lengths())
    return _replaced(features, no_ids, no_lengths, [0] * len(features.keys())), error


def _replaced(
    features: KeyedJaggedTensor, values: torch.Tensor, lengths: torch.Tensor, length_per_key: Optional[list[int]]
) -> KeyedJaggedTensor:
    weights = features.weights_or_none()
    variable_stride = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=None if weights is None else weights[: values.numel()],
        lengths=lengths,
        stride=None if variable_stride else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable_stride else None,
        length_per_key=length_per_key,  # torchrec would ask the device again
        inverse_indices=features.inverse_indices_or_none(),
    )
