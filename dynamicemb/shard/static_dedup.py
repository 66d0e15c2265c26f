"""Index deduplication of torchrec's static tables where torchrec has no operator for it: on the CPU."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.kernels.dedup import dedup

__all__ = ["dedup_static"]


def dedup_static(features: KeyedJaggedTensor, features_by_table: list[int]) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Each distinct (table, id) once.

    Args:
        features: ids of all features, those of a table next to each other.
        features_by_table: number of features of each table.

    Returns:
        A jagged tensor with the same keys and stride that holds a table's distinct ids, all of them in the first sample
        of its first feature, and int64 [ids of ``features``], where each id has gone.
    """
    if features.values().numel() == 0:
        return features, torch.zeros(0, dtype=torch.int64)
    lengths = torch.zeros_like(features.lengths())
    lengths_by_feature = features.length_per_key()
    table_lengths, first_features, first = [], [], 0
    for num_features in features_by_table:
        first_features.append(first)
        table_lengths.append(sum(lengths_by_feature[first : first + num_features]))
        first += num_features
    tables = torch.repeat_interleave(
        torch.arange(len(features_by_table), dtype=torch.int32), torch.tensor(table_lengths)
    )
    unique = dedup(features.values().long(), tables, len(features_by_table), 1)
    counts = torch.bincount(unique.tables, minlength=len(features_by_table))
    lengths.view(-1, features.stride())[first_features, 0] = counts.to(lengths.dtype)
    return (
        KeyedJaggedTensor(
            keys=features.keys(),
            values=unique.keys.to(features.values().dtype),
            lengths=lengths,
            stride=features.stride(),
        ),
        unique.inverse,
    )
