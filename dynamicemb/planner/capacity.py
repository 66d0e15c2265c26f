"""From what the user said and what the model says to the options that a table is built with, checked."""

from __future__ import annotations

import dataclasses
from typing import Optional

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, data_type_to_dtype

from dynamicemb.errors import ConfigError
from dynamicemb.kernels.layout import buckets_for
from dynamicemb.options import (
    DIM_MULTIPLE,
    EMBEDDING_DTYPES,
    MAX_DIM,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
    check_row_width,
)

__all__ = ["DIM_MULTIPLE", "MAX_DIM", "check_dim", "resolve_options"]


def check_dim(table: str, dim: int) -> None:
    """:func:`~dynamicemb.options.check_row_width` of a table of the model."""
    check_row_width(dim, f"table '{table}': embedding_dim")


def resolve_options(
    table_name: str,
    embedding_config: BaseEmbeddingConfig,
    options: Optional[DynamicEmbTableOptions],
    world_size: int,
) -> DynamicEmbTableOptions:
    """The options that a rank builds its part of a table with. Neither argument is modified.

    ``dim``, ``embedding_dtype``, ``max_capacity``, ``init_capacity`` and the bounds of both initializers are filled in:

    * ``max_capacity``: rows on each rank in whole buckets, ``ceil(num_embeddings / world_size)`` if not given;
    * ``init_capacity``: ``max_capacity`` if not given;
    * bounds of a UNIFORM initializer: the config's ``weight_init_min`` and ``weight_init_max``, as for torchrec's own
      tables, and without those plus and minus ``sqrt(1 / num_embeddings)``.

    Args:
        table_name: for messages.
        embedding_config: torchrec's config; its ``num_embeddings`` counts the rows of all ranks.
        options: the user's; None: all defaults.
        world_size: ranks that the table is divided over.

    Raises:
        ConfigError: a value of the config or the options that cannot be honoured.
    """
    options = DynamicEmbTableOptions() if options is None else options
    num_embeddings = embedding_config.num_embeddings
    if num_embeddings <= 0:
        raise ConfigError(f"table '{table_name}': num_embeddings={num_embeddings} is not positive; use 1 or more")
    if options.dim is not None and options.dim != embedding_config.embedding_dim:
        raise ConfigError(
            f"table '{table_name}': dynamicemb_options.dim={options.dim} is not the model's "
            f"embedding_dim={embedding_config.embedding_dim}; leave dim out"
        )
    check_dim(table_name, embedding_config.embedding_dim)
    rows_on_rank = options.max_capacity or -(-num_embeddings // world_size)
    max_capacity = buckets_for(rows_on_rank, options.bucket_capacity) * options.bucket_capacity
    if options.init_capacity is not None and options.init_capacity > max_capacity:
        raise ConfigError(
            f"table '{table_name}': init_capacity={options.init_capacity} is above max_capacity={max_capacity} of each "
            f"rank (num_embeddings={num_embeddings} on {world_size} ranks, in whole buckets); lower it, or leave it out"
        )
    evaluation = options.eval_initializer_args
    embedding_dtype = _embedding_dtype(table_name, embedding_config, options)
    initializer = _with_bounds(table_name, options.initializer_args, embedding_config)
    eval_initializer = None if evaluation is None else _with_bounds(table_name, evaluation, embedding_config)
    try:
        return dataclasses.replace(
            options,
            dim=embedding_config.embedding_dim,
            embedding_dtype=embedding_dtype,
            max_capacity=max_capacity,
            init_capacity=options.init_capacity or max_capacity,
            initializer_args=initializer,
            eval_initializer_args=eval_initializer,
        )
    except ConfigError as error:
        raise ConfigError(
            f"table '{table_name}': {error} (num_embeddings={num_embeddings} on {world_size} ranks)"
        ) from error


def _embedding_dtype(table: str, config: BaseEmbeddingConfig, options: DynamicEmbTableOptions) -> torch.dtype:
    if options.embedding_dtype is not None:
        return options.embedding_dtype
    names = "FP32, FP16 or BF16"
    try:
        dtype = data_type_to_dtype(config.data_type)
    except ValueError:  # what torchrec raises for a type without a torch dtype
        dtype = None
    if dtype not in EMBEDDING_DTYPES:
        raise ConfigError(
            f"table '{table}': data_type={config.data_type} cannot be trained in a dynamic table; use {names}, "
            "or set dynamicemb_options.embedding_dtype"
        )
    return dtype


def _with_bounds(table: str, args: DynamicEmbInitializerArgs, config: BaseEmbeddingConfig) -> DynamicEmbInitializerArgs:
    try:
        if args.mode is DynamicEmbInitializerMode.UNIFORM:
            args = dataclasses.replace(
                args,
                lower=config.weight_init_min if args.lower is None else args.lower,
                upper=config.weight_init_max if args.upper is None else args.upper,
            )
        return args.resolved(config.num_embeddings)
    except ConfigError as error:
        raise ConfigError(
            f"table '{table}': {error} (bounds that are not given are weight_init_min and weight_init_max of the "
            "table's config, or plus and minus sqrt(1 / num_embeddings))"
        ) from error
