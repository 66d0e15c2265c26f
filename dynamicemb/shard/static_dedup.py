"""Index deduplication of torchrec's static tables where torchrec has no operator for it: on the CPU."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.views import UniqueKeys

__all__ = ["dedup_replicated", "dedup_static"]


def dedup_static(features: KeyedJaggedTensor, features_by_table: list[int]) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Each distinct (table, id) once.

    Args:
        features: ids of all features, those of a table next to each other.
        features_by_table: number of features of each table.

    Returns:
        A jagged tensor with the same keys and stride, but without weights, that holds a table's distinct ids, all of
        them in the first sample of its first feature, and int64 [ids of ``features``], where each id has gone.
    """
    if features.values().numel() == 0:
        # Without weights here, too: what travels must not depend on whether a rank has ids.
        no_ids = KeyedJaggedTensor(
            keys=features.keys(), values=features.values(), lengths=features.lengths(), stride=features.stride()
        )
        return no_ids, torch.zeros(0, dtype=torch.int64)
    unique, first_features, counts = _unique_ids(features, features_by_table)
    lengths = torch.zeros_like(features.lengths())
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


def dedup_replicated(
    features: KeyedJaggedTensor, features_by_table: list[int], tables_by_group: list[int]
) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """:func:`dedup_static` for data-parallel tables, whose operator has no unpooled form on the CPU: it adds up what a
    sample has, and returns [samples, features * dim] for each group of tables. So each id is a sample of its own.

    Args:
        features, features_by_table: as above.
        tables_by_group: number of tables of each of torchrec's groups.

    Returns:
        A jagged tensor with the same keys that holds a table's distinct ids in its first feature, one in each sample,
        filled up with the id 0; and int64 [ids of ``features``], where in the rows of all groups each id's row is.
    """
    if features.values().numel() == 0:
        return features, torch.zeros(0, dtype=torch.int64)
    unique, first_features, counts = _unique_ids(features, features_by_table)
    num_samples = int(counts.max())
    tables = unique.tables.long()
    samples = torch.arange(tables.numel()) - (counts.cumsum(0) - counts)[tables]
    values = torch.zeros(len(features.keys()) * num_samples, dtype=features.values().dtype)
    values[torch.tensor(first_features)[tables] * num_samples + samples] = unique.keys.to(values.dtype)
    first_rows, strides = [], []
    table, group_start = 0, 0  # the latter in features
    for num_tables in tables_by_group:
        num_features = sum(features_by_table[table : table + num_tables])
        for first in first_features[table : table + num_tables]:
            first_rows.append(group_start * num_samples + first - group_start)
            strides.append(num_features)
        table, group_start = table + num_tables, group_start + num_features
    places = torch.tensor(first_rows)[tables] + samples * torch.tensor(strides)[tables]
    return (
        KeyedJaggedTensor(
            keys=features.keys(),
            values=values,
            lengths=torch.ones(values.numel(), dtype=features.lengths().dtype),
            stride=num_samples,
        ),
        places[unique.inverse],
    )


def _unique_ids(
    features: KeyedJaggedTensor, features_by_table: list[int]
) -> tuple[UniqueKeys, list[int], torch.Tensor]:
    """The distinct ids of all tables, each table's first feature, and int64 [tables], how many ids each has."""
    lengths_by_feature = features.length_per_key()
    table_lengths, first_features, first = [], [], 0
    for num_features in features_by_table:
        first_features.append(first)
        table_lengths.append(sum(lengths_by_feature[first : first + num_features]))
        first += num_features
    tables = torch.repeat_interleave(
        torch.arange(len(features_by_table), dtype=torch.int32), torch.tensor(table_lengths)
    )
    unique = dedup(features.values().long(), tables, len(features_by_table), 1, [table_lengths])
    return unique, first_features, torch.bincount(unique.tables, minlength=len(features_by_table))
