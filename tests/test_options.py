"""Options: defaults, what each field accepts, the error for what it does not, the warning for what has no effect."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

import dynamicemb
from dynamicemb import (
    ConfigError,
    DynamicEmbCheckMode,
    DynamicEmbError,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
    DynamicEmbWarning,
    options,
)


@pytest.fixture(autouse=True)
def _no_field_has_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_warned_fields", set())


def test_public_names() -> None:
    assert all(hasattr(dynamicemb, name) for name in dynamicemb.__all__)
    assert [(mode.name, int(mode)) for mode in DynamicEmbCheckMode] == [("ERROR", 0), ("WARNING", 1), ("IGNORE", 2)]
    assert {mode.name: mode.value for mode in DynamicEmbInitializerMode} == {
        "NORMAL": "normal",
        "TRUNCATED_NORMAL": "truncated_normal",
        "UNIFORM": "uniform",
        "CONSTANT": "constant",
        "DEBUG": "debug",
    }
    assert {"LRU", "LFU", "CUSTOMIZED"} <= {strategy.name for strategy in DynamicEmbEvictStrategy}


def test_errors_are_what_a_caller_would_catch() -> None:
    for error, builtin in (
        (dynamicemb.ConfigError, ValueError),
        (dynamicemb.DataError, ValueError),
        (dynamicemb.KeyTypeError, TypeError),
        (dynamicemb.CapacityError, RuntimeError),
    ):
        assert issubclass(error, DynamicEmbError) and issubclass(error, builtin)
    assert issubclass(DynamicEmbWarning, UserWarning)


def test_defaults() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = DynamicEmbTableOptions()
    expected = {
        "index_type": torch.int64,
        "embedding_dtype": None,
        "score_type": torch.int64,
        "device_id": None,
        "dim": None,
        "max_capacity": None,
        "init_capacity": None,
        "max_load_factor": 0.5,
        "global_hbm_for_values": 0,
        "local_hbm_for_values": 0,
        "evict_strategy": DynamicEmbEvictStrategy.LRU,
        "bucket_capacity": 128,
        "block_size": 128,
        "io_block_size": 1024,
        "io_by_cpu": False,
        "use_constant_memory": False,
        "reserved_key_start_bit": 0,
        "num_of_buckets_per_alloc": 1,
        "initializer_args": DynamicEmbInitializerArgs(),
        "safe_check_mode": DynamicEmbCheckMode.IGNORE,
        "seed": 0,
        "eval_initializer_args": None,
    }
    assert {name: getattr(table, name) for name in expected} == expected
    assert [getattr(DynamicEmbInitializerArgs(), f.name) for f in dataclasses.fields(DynamicEmbInitializerArgs)] == [
        DynamicEmbInitializerMode.UNIFORM, 0.0, 1.0, None, None, 0.0,
    ]  # fmt: skip


def test_options_are_values() -> None:
    assert DynamicEmbTableOptions(dim=8) == DynamicEmbTableOptions(dim=8)
    assert DynamicEmbTableOptions(dim=8) != DynamicEmbTableOptions(dim=16)
    assert hash(DynamicEmbTableOptions(dim=8)) == hash(DynamicEmbTableOptions(dim=8))
    options = DynamicEmbTableOptions(dim=8, seed=3, initializer_args=DynamicEmbInitializerArgs(std_dev=2.0))
    for copied in (copy.deepcopy(options), pickle.loads(pickle.dumps(options)), dataclasses.replace(options)):
        assert copied == options and hash(copied) == hash(options) and copied is not options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_dtype", torch.float16),
        ("embedding_dtype", torch.bfloat16),
        ("score_type", torch.uint64),
        ("dim", 4),
        ("max_capacity", 1),
        ("init_capacity", 10**9),
        ("max_load_factor", 1.0),
        ("bucket_capacity", 8),
        ("bucket_capacity", 256),
        ("evict_strategy", DynamicEmbEvictStrategy.CUSTOMIZED),
        ("safe_check_mode", DynamicEmbCheckMode.ERROR),
        ("seed", 2**64 - 1),
        ("seed", -(2**63)),
        ("eval_initializer_args", DynamicEmbInitializerArgs()),
    ],
)
def test_accepted_without_a_warning(field: str, value: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(DynamicEmbTableOptions(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index_type", torch.float32),
        ("index_type", torch.int16),
        ("embedding_dtype", torch.float64),
        ("embedding_dtype", torch.int8),
        ("score_type", torch.float32),
        ("dim", 0),
        ("dim", -8),
        ("dim", 6),
        ("dim", 1028),
        ("dim", -1.0),
        ("dim", "8"),
        ("dim", 8.0),
        ("dim", True),
        ("max_capacity", 0),
        ("max_capacity", -2),
        ("max_capacity", 2**40 + 1),
        ("init_capacity", True),
        ("init_capacity", 0),
        ("init_capacity", 1.5),
        ("max_load_factor", 0.0),
        ("max_load_factor", -0.5),
        ("max_load_factor", 1.01),
        ("max_load_factor", math.nan),
        ("max_load_factor", "half"),
        ("bucket_capacity", 128.0),
        ("bucket_capacity", None),
        ("bucket_capacity", 4),
        ("bucket_capacity", 100),
        ("bucket_capacity", 512),
        ("evict_strategy", "lru"),
        ("initializer_args", None),
        ("initializer_args", "uniform"),
        ("eval_initializer_args", 0.0),
        ("safe_check_mode", 3),
        ("safe_check_mode", "error"),
        ("seed", 2**64),
        ("seed", 1.5),
        ("seed", "7"),
        ("seed", None),
        ("safe_check_mode", None),
        ("seed", -(2**63) - 1),
    ],
)
def test_rejected_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        DynamicEmbTableOptions(**{field: value})
    assert field in str(caught.value) and str(value) in str(caught.value)


def test_init_capacity_may_not_exceed_max_capacity() -> None:
    DynamicEmbTableOptions(init_capacity=100, max_capacity=100)
    with pytest.raises(ConfigError, match="init_capacity=101 is above max_capacity=100; lower it"):
        DynamicEmbTableOptions(init_capacity=101, max_capacity=100)


def test_check_mode_may_be_a_number() -> None:
    assert DynamicEmbTableOptions(safe_check_mode=0).safe_check_mode is DynamicEmbCheckMode.ERROR  # type: ignore[arg-type]


WITHOUT_EFFECT = {
    "index_type": torch.int32,
    "device_id": 0,
    "global_hbm_for_values": 1 << 30,
    "local_hbm_for_values": 1 << 30,
    "block_size": 256,
    "io_block_size": 512,
    "io_by_cpu": True,
    "use_constant_memory": True,
    "reserved_key_start_bit": 1,
    "num_of_buckets_per_alloc": 4,
}


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_fields_without_effect_warn_once(field: str) -> None:
    with pytest.warns(DynamicEmbWarning, match=f"{field} is accepted for compatibility and has no effect") as record:
        DynamicEmbTableOptions(**{field: WITHOUT_EFFECT[field]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DynamicEmbTableOptions(**{field: WITHOUT_EFFECT[field]})
    assert len(record) == 1
    assert record[0].filename == __file__, "the warning must point at the caller"


@pytest.mark.parametrize("field", [*WITHOUT_EFFECT, "score_type"])
def test_the_docstring_says_what_has_no_effect(field: str) -> None:
    text = " ".join((DynamicEmbTableOptions.__doc__ or "").split())
    before, _, _ = text.partition("Raises:")
    sentence = next(part for part in before.split(": ") if f"{field}" in part)
    after = before[before.index(sentence) + len(sentence) :]
    assert after.startswith(": accepted for compatibility, no effect")


def test_every_field_is_documented() -> None:
    for config in (DynamicEmbTableOptions, DynamicEmbInitializerArgs):
        missing = [field.name for field in dataclasses.fields(config) if field.name not in (config.__doc__ or "")]
        assert missing == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "normal"}, "initializer mode.*'normal'"),
        ({"mean": math.inf}, "mean=inf is not a finite number"),
        ({"std_dev": math.nan}, "std_dev=nan is not a finite number"),
        ({"lower": -math.inf}, "lower=-inf is not a finite number"),
        ({"upper": math.nan}, "upper=nan is not a finite number"),
        ({"value": math.inf}, "value=inf is not a finite number"),
        ({"std_dev": -1.0}, "std_dev=-1.0 is negative; use 0 or more"),
        ({"lower": 1.0, "upper": 0.5}, "lower=1.0 is above upper=0.5"),
        ({"value": 1e39}, "value=1e\\+39 is outside the range of float32"),
        ({"std_dev": None}, "std_dev=None is not a finite number"),
        ({"mean": "0"}, "mean=0 is not a finite number"),
        (
            {"mode": DynamicEmbInitializerMode.TRUNCATED_NORMAL, "lower": 10.0, "upper": 11.0},
            "lower=10.0 and upper=11.0 are so far from mean=0.0 with std_dev=1.0",
        ),
    ],
)
def test_initializer_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DynamicEmbInitializerArgs(**arguments)  # type: ignore[arg-type]


def test_default_bounds() -> None:
    uniform = DynamicEmbInitializerArgs()
    assert (uniform.resolved(400).lower, uniform.resolved(400).upper) == (-0.05, 0.05)
    assert DynamicEmbInitializerArgs(lower=-1.0).resolved(400) == DynamicEmbInitializerArgs(lower=-1.0, upper=0.05)
    assert DynamicEmbInitializerArgs(upper=3.0).resolved(400) == DynamicEmbInitializerArgs(lower=-0.05, upper=3.0)
    given = DynamicEmbInitializerArgs(lower=-2.0, upper=3.0)
    assert given.resolved(400) == given
    truncated = DynamicEmbInitializerArgs(DynamicEmbInitializerMode.TRUNCATED_NORMAL, mean=1.0, std_dev=0.5)
    assert (truncated.resolved(7).lower, truncated.resolved(7).upper) == (0.0, 2.0)
    for mode in (DynamicEmbInitializerMode.NORMAL, DynamicEmbInitializerMode.CONSTANT, DynamicEmbInitializerMode.DEBUG):
        assert DynamicEmbInitializerArgs(mode).resolved(400) == DynamicEmbInitializerArgs(mode)
    assert uniform == DynamicEmbInitializerArgs(), "arguments that a user passed in are never modified"


@pytest.mark.parametrize("field", ["dim", "max_capacity", "init_capacity", "device_id"])
def test_minus_one_is_not_given(field: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DynamicEmbTableOptions(**{field: -1}) == DynamicEmbTableOptions()  # type: ignore[arg-type]


def test_other_ways_to_say_the_same() -> None:
    unset = DynamicEmbTableOptions(index_type=None, score_type=None)  # type: ignore[arg-type]
    assert unset == DynamicEmbTableOptions()
    of_numpy = DynamicEmbTableOptions(dim=np.int64(8), max_capacity=np.int32(9), seed=np.uint64(2**63))  # type: ignore[arg-type]
    assert of_numpy == DynamicEmbTableOptions(dim=8, max_capacity=9, seed=2**63)
    assert {type(of_numpy.dim), type(of_numpy.max_capacity), type(of_numpy.seed)} == {int}


def test_fields_can_be_assigned() -> None:
    options = DynamicEmbTableOptions(max_capacity=100)
    options.dim = 8
    options.init_capacity = -1
    options.safe_check_mode = 0  # type: ignore[assignment]
    options.initializer_args.value = 0.5
    initializer = DynamicEmbInitializerArgs(value=0.5)
    expected = DynamicEmbTableOptions(
        max_capacity=100, dim=8, safe_check_mode=DynamicEmbCheckMode.ERROR, initializer_args=initializer
    )
    assert options == expected and hash(options) == hash(expected)
    with pytest.warns(DynamicEmbWarning, match="block_size is accepted for compatibility") as record:
        options.block_size = 256
    assert record[0].filename == __file__, "the warning must point at the caller"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dim", 6, "dim=6 is not a positive multiple of 4; use 8"),
        ("init_capacity", 101, "init_capacity=101 is above max_capacity=100"),
        ("seed", None, "seed=None is not an integer"),
        ("max_capacty", 5, "DynamicEmbTableOptions has no field max_capacty; its fields are .*max_capacity"),
    ],
)
def test_an_assignment_that_is_refused_changes_nothing(field: str, value: object, message: str) -> None:
    options = DynamicEmbTableOptions(max_capacity=100)
    with pytest.raises(ConfigError, match=message):
        setattr(options, field, value)
    assert options == DynamicEmbTableOptions(max_capacity=100) and not hasattr(options, "max_capacty")
    initializer = DynamicEmbInitializerArgs()
    with pytest.raises(ConfigError, match=r"std_dev=-1\.0 is negative"):
        initializer.std_dev = -1.0
    assert initializer == DynamicEmbInitializerArgs()
