"""Options filled in from the model, and the errors that this can give."""

import dataclasses
import math

import pytest
import torch
from torchrec.modules.embedding_configs import DataType

from dynamicemb import ConfigError, DynamicEmbInitializerArgs, DynamicEmbInitializerMode, DynamicEmbTableOptions
from dynamicemb.planner.capacity import MAX_DIM, check_dim, resolve_options
from tests.planner.models import config


@pytest.mark.parametrize(
    ("num_embeddings", "world_size", "rows_on_rank"),
    [
        (1000, 1, 1024),
        (1000, 2, 512),
        (1000, 3, 384),
        (1024, 1, 1024),
        (1025, 1, 1152),
        (1026, 2, 640),
        (1, 1, 128),
        (2, 3, 128),
        (384, 3, 128),
        (385, 3, 256),
    ],
)
def test_capacity_is_the_rank_s_share_in_whole_buckets(num_embeddings, world_size, rows_on_rank):
    resolved = resolve_options("item", config("item", num_embeddings), None, world_size)
    assert resolved.max_capacity == rows_on_rank
    assert resolved.init_capacity == rows_on_rank


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_given_capacity_counts_rows_of_one_rank(world_size):
    options = DynamicEmbTableOptions(max_capacity=100, init_capacity=20, bucket_capacity=16)
    resolved = resolve_options("item", config("item", 10**6), options, world_size)
    assert (resolved.max_capacity, resolved.init_capacity) == (112, 20)


def test_everything_is_filled_in_and_the_rest_kept():
    options = DynamicEmbTableOptions(seed=7, bucket_capacity=8, max_load_factor=0.75)
    given = dataclasses.replace(options)
    resolved = resolve_options("item", config("item", 400, dim=12, data_type=DataType.BF16), options, 2)
    assert options == given
    assert (resolved.dim, resolved.embedding_dtype) == (12, torch.bfloat16)
    assert (resolved.seed, resolved.bucket_capacity, resolved.max_load_factor) == (7, 8, 0.75)
    assert (resolved.initializer_args.lower, resolved.initializer_args.upper) == (-0.05, 0.05)
    assert resolved.eval_initializer_args is None
    assert resolve_options("item", config("item", 400, dim=12), resolved, 2) == resolved


def test_dtype_of_options_wins_over_that_of_the_config():
    options = DynamicEmbTableOptions(embedding_dtype=torch.float16)
    assert resolve_options("item", config("item"), options, 1).embedding_dtype == torch.float16
    int8 = config("item", data_type=DataType.INT8)
    assert resolve_options("item", int8, options, 1).embedding_dtype == torch.float16


def test_bounds_of_both_initializers():
    uniform = DynamicEmbInitializerArgs(lower=-1.0)
    truncated = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.TRUNCATED_NORMAL, mean=1.0, std_dev=0.5)
    options = DynamicEmbTableOptions(initializer_args=uniform, eval_initializer_args=truncated)
    resolved = resolve_options("item", config("item", 100), options, 3)
    assert (resolved.initializer_args.lower, resolved.initializer_args.upper) == (-1.0, math.sqrt(1 / 100))
    assert (resolved.eval_initializer_args.lower, resolved.eval_initializer_args.upper) == (0.0, 2.0)


def test_bounds_of_the_config_are_used_as_torchrec_does():
    bounded = config("item", 100, weight_init_min=-0.5, weight_init_max=0.25)
    options = DynamicEmbTableOptions(eval_initializer_args=DynamicEmbInitializerArgs(upper=0.3))
    resolved = resolve_options("item", bounded, options, 1)
    assert (resolved.initializer_args.lower, resolved.initializer_args.upper) == (-0.5, 0.25)
    assert (resolved.eval_initializer_args.lower, resolved.eval_initializer_args.upper) == (-0.5, 0.3)
    constant = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT, value=3.0)
    kept = resolve_options("item", bounded, DynamicEmbTableOptions(initializer_args=constant), 1)
    assert kept.initializer_args == constant


@pytest.mark.parametrize("dim", [4, 8, 12, 64, 128, 1000, MAX_DIM])
def test_supported_dims(dim):
    check_dim("item", dim)


@pytest.mark.parametrize(
    ("dim", "remedy"), [(30, "use 32"), (1, "use 4"), (0, "use 4"), (-4, "use 4"), (1028, "lower it")]
)
def test_unsupported_dims(dim, remedy):
    with pytest.raises(ConfigError, match=rf"table 'item': embedding_dim={dim} .*{remedy}"):
        check_dim("item", dim)


def test_dim_of_the_options_must_be_the_model_s():
    options = DynamicEmbTableOptions(dim=32)
    with pytest.raises(
        ConfigError, match=r"table 'item': dynamicemb_options.dim=32 .* embedding_dim=16; leave dim out"
    ):
        resolve_options("item", config("item"), options, 1)
    assert resolve_options("item", config("item"), DynamicEmbTableOptions(dim=16), 1).dim == 16


@pytest.mark.parametrize("num_embeddings", [0, -5])
def test_non_positive_num_embeddings(num_embeddings):
    table = config("item")
    table.num_embeddings = num_embeddings
    with pytest.raises(ConfigError, match=rf"table 'item': num_embeddings={num_embeddings} .* use 1 or more"):
        resolve_options("item", table, None, 1)


@pytest.mark.parametrize("data_type", [DataType.INT8, DataType.UINT8, DataType.INT4, DataType.INT32])
def test_data_type_that_cannot_be_trained(data_type):
    with pytest.raises(ConfigError, match=r"table 'item': data_type=.* use FP32, FP16 or BF16"):
        resolve_options("item", config("item", data_type=data_type), None, 1)


def test_init_capacity_above_the_derived_capacity():
    options = DynamicEmbTableOptions(init_capacity=513)
    with pytest.raises(ConfigError, match=r"table 'item': init_capacity=513 is above max_capacity=512 .* lower it"):
        resolve_options("item", config("item", 1000), options, 2)


def test_bounds_that_cross_name_the_table():
    options = DynamicEmbTableOptions(initializer_args=DynamicEmbInitializerArgs(lower=0.5))
    with pytest.raises(ConfigError, match=r"table 'item': initializer lower=0.5 is above upper"):
        resolve_options("item", config("item", 1000), options, 1)
