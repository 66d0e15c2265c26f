"""What a user can say about a dynamic table: plain data, checked on construction and assignment, free of torchrec."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import operator
import warnings
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Optional

import torch

from dynamicemb.errors import ConfigError, DynamicEmbWarning

__all__ = [
    "BUCKET_CAPACITIES",
    "DIM_MULTIPLE",
    "EMBEDDING_DTYPES",
    "INDEX_DTYPES",
    "MAX_CAPACITY",
    "MAX_DIM",
    "DynamicEmbCheckMode",
    "DynamicEmbEvictStrategy",
    "DynamicEmbInitializerArgs",
    "DynamicEmbInitializerMode",
    "DynamicEmbTableOptions",
    "check_row_width",
]

#: Slots per bucket that the kernels are built for: powers of two, at least one 8-byte word of digests.
BUCKET_CAPACITIES = (8, 16, 32, 64, 128, 256)
#: Columns of a row come in groups of this many: one 128-bit access of float32.
DIM_MULTIPLE = 4
#: Widest row that the kernels are built for.
MAX_DIM = 1024
#: Most rows of a table on one rank: the bits that a slot handle has for them.
MAX_CAPACITY = 2**40
#: Dtypes in which rows can be stored. Optimizer state is always float32.
EMBEDDING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Dtypes of ids that are accepted; all of them are widened (uint64: reinterpreted) to int64.
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint64)
#: What other implementations write for a number that is not given.
_UNSET = -1


def check_row_width(dim: object, name: str = "dim") -> None:
    """Check that the kernels support rows of ``dim`` columns; ``name`` is what the message calls them.

    Raises:
        ConfigError: ``dim`` is not a multiple of :data:`DIM_MULTIPLE` between that and :data:`MAX_DIM`.
    """
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise ConfigError(f"{name}={dim!r} is not a positive integer")
    if dim > MAX_DIM:
        raise ConfigError(f"{name}={dim} is above {MAX_DIM}, the widest row that kernels support; lower it")
    if dim <= 0 or dim % DIM_MULTIPLE:
        nearest = max(DIM_MULTIPLE, -(-dim // DIM_MULTIPLE) * DIM_MULTIPLE)
        raise ConfigError(f"{name}={dim} is not a positive multiple of {DIM_MULTIPLE}; use {nearest}")


class DynamicEmbCheckMode(enum.IntEnum):
    """What happens when keys are refused because every slot of their bucket is taken by the current batch."""

    #: Raise :class:`~dynamicemb.errors.CapacityError` on every rank. Costs one host synchronisation a step.
    ERROR = 0
    #: Warn with table name and counts. Costs one host synchronisation a step.
    WARNING = 1
    #: Only count; read the counter from the table's statistics.
    IGNORE = 2


class DynamicEmbInitializerMode(enum.Enum):
    """Distribution of the first value of a row. Every value depends on (seed, table name, key, column) alone."""

    NORMAL = "normal"
    TRUNCATED_NORMAL = "truncated_normal"
    UNIFORM = "uniform"
    CONSTANT = "constant"
    #: Every column holds ``float(key mod 100000)`` (the mathematical, never negative, remainder), rounded to the dtype
    #: of the table: float16 has no number for remainders of 65520 and more, and stores infinity.
    DEBUG = "debug"


class DynamicEmbEvictStrategy(enum.Enum):
    """What a slot's score means. The slot with the least (score, id) of a full bucket is evicted first."""

    #: Score = the table's step clock, one tick for each training lookup: the least recently trained key goes.
    LRU = "lru"
    #: Score = occurrences of the key in training (not batches): the least frequently seen key goes.
    LFU = "lfu"
    #: Score = the value last given through :func:`dynamicemb.shard.set_score`.
    CUSTOMIZED = "customized"


# What an initializer looks at.
_NUMBERS_OF_MODE = {
    DynamicEmbInitializerMode.NORMAL: ("mean", "std_dev"),
    DynamicEmbInitializerMode.TRUNCATED_NORMAL: ("mean", "std_dev", "lower", "upper"),
    DynamicEmbInitializerMode.UNIFORM: ("lower", "upper"),
    DynamicEmbInitializerMode.CONSTANT: ("value",),
    DynamicEmbInitializerMode.DEBUG: (),
}


class _Checked:
    """Fields may be assigned after construction, with the checks of the constructor; a refused value changes nothing.

    A table is built from a copy, so what is assigned later reaches the next plan, not the tables of an earlier one.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            known = ", ".join(self.__dataclass_fields__)  # type: ignore[attr-defined]
            raise ConfigError(f"{type(self).__name__} has no field {name}; its fields are {known}")
        if name not in self.__dict__:  # the constructor checks when it has all of them
            self.__dict__[name] = value
            return
        before = dict(self.__dict__)
        self.__dict__[name] = value
        try:
            self._check()
        except ConfigError:
            self.__dict__.update(before)
            raise
        self._warn(stacklevel=3)

    def __post_init__(self) -> None:
        self._check()
        self._warn(stacklevel=4)

    def _check(self) -> None:
        """Raises a ConfigError, or brings the fields into their normal form."""

    def _warn(self, stacklevel: int) -> None:
        """Warns about fields that change nothing."""


@dataclass(unsafe_hash=True)
class DynamicEmbInitializerArgs(_Checked):
    """Parameters of an initializer; which ones matter depends on ``mode``. Planning warns of others that are given.

    Attributes:
        mode: the distribution.
        mean, std_dev: of NORMAL, and of TRUNCATED_NORMAL before truncation.
        lower, upper: bounds of UNIFORM (default: plus and minus ``sqrt(1 / num_embeddings)`` of the whole table) and of
            TRUNCATED_NORMAL (default: two standard deviations on each side of the mean).
        value: of CONSTANT.

    Raises:
        ConfigError: a parameter is not a finite float32 number, ``std_dev`` is negative, ``lower`` is above ``upper``,
            or a normal distribution has nothing between them.
    """

    mode: DynamicEmbInitializerMode = DynamicEmbInitializerMode.UNIFORM
    mean: float = 0.0
    std_dev: float = 1.0
    lower: Optional[float] = None
    upper: Optional[float] = None
    value: float = 0.0

    def _check(self) -> None:
        _require_kind("initializer mode", self.mode, DynamicEmbInitializerMode)
        for name in ("mean", "std_dev", "lower", "upper", "value"):
            number = getattr(self, name)
            if number is None and name in ("lower", "upper"):
                continue
            if not _is_number(number) or not math.isfinite(number):
                raise ConfigError(f"initializer {name}={number} is not a finite number")
            if abs(number) > torch.finfo(torch.float32).max:
                raise ConfigError(f"initializer {name}={number} is outside the range of float32; use a smaller number")
        if self.std_dev < 0:
            raise ConfigError(f"initializer std_dev={self.std_dev} is negative; use 0 or more")
        if self.lower is not None and self.upper is not None:
            self._check_bounds(self.lower, self.upper)

    def _check_bounds(self, lower: float, upper: float) -> None:
        if lower > upper:
            raise ConfigError(f"initializer lower={lower} is above upper={upper}; exchange them")
        if self.mode is not DynamicEmbInitializerMode.TRUNCATED_NORMAL or self.std_dev == 0 or lower == upper:
            return
        distribution = NormalDist(self.mean, self.std_dev)
        if distribution.cdf(lower) == distribution.cdf(upper):
            raise ConfigError(
                f"initializer lower={lower} and upper={upper} are so far from mean={self.mean} with "
                f"std_dev={self.std_dev} that no number between them can be drawn; move them, or use UNIFORM"
            )

    @property
    def without_effect(self) -> list[str]:
        """Numbers that have been given and do not matter in this mode."""
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return [name for name in given if name != "mode" and name not in _NUMBERS_OF_MODE[self.mode]]

    def resolved(self, num_embeddings: int) -> DynamicEmbInitializerArgs:
        """A copy with the default bounds filled in, for a table of ``num_embeddings`` rows over all ranks."""
        if self.mode is DynamicEmbInitializerMode.UNIFORM:
            default_lower, default_upper = -math.sqrt(1.0 / num_embeddings), math.sqrt(1.0 / num_embeddings)
        elif self.mode is DynamicEmbInitializerMode.TRUNCATED_NORMAL:
            default_lower, default_upper = self.mean - 2.0 * self.std_dev, self.mean + 2.0 * self.std_dev
        else:
            return dataclasses.replace(self)
        return dataclasses.replace(
            self,
            lower=default_lower if self.lower is None else self.lower,
            upper=default_upper if self.upper is None else self.upper,
        )


# Fields that exist so that code written for other implementations keeps running. They change nothing here, because the
# thing they tune does not exist in this design; a value other than the default warns once per field.
_NO_EFFECT = {
    "index_type": "ids of every integer dtype of 32 or 64 bits are accepted, and kept as 64-bit keys",
    "score_type": "scores are 64-bit integers",
    "device_id": "the device is the one that torchrec shards to",
    "global_hbm_for_values": "all rows live on the table's device",
    "local_hbm_for_values": "all rows live on the table's device",
    "block_size": "kernels choose their own block sizes",
    "io_block_size": "kernels choose their own block sizes",
    "io_by_cpu": "rows never travel through the host",
    "use_constant_memory": "kernels take their parameters by argument",
    "reserved_key_start_bit": "no key is reserved: every 64-bit id can be stored",
    "num_of_buckets_per_alloc": "a table grows by doubling, one allocation for each doubling",
}
_warned_fields: set[str] = set()


@dataclass(unsafe_hash=True)
class DynamicEmbTableOptions(_Checked):
    """Options of one dynamic table. All of them have defaults; a table works with none given.

    Fields may be assigned after construction, with the same checks. Where an integer may be None, -1 means None too.

    Attributes:
        index_type: accepted for compatibility, no effect: ids of every integer dtype of 32 or 64 bits are accepted,
            whatever it says. Narrower ids are widened, uint64 is reinterpreted, so every 64-bit pattern is a key of
            its own.
        embedding_dtype: dtype of the stored rows: float32, float16 or bfloat16. None: the dtype of the torchrec config.
            Rows of 16 bits are rounded to nearest, and an update of less than about 0.3 % (bfloat16) or 0.04 %
            (float16) of a value is lost; a warning says so unless ``stochastic_rounding=False`` is among the fused
            parameters.
        score_type: accepted for compatibility, no effect: scores are 64-bit integers.
        device_id: accepted for compatibility, no effect: the device is the one that torchrec shards to.
        dim: columns of a row. None: the embedding_dim of the torchrec config; if given, it must equal that.
        max_capacity: rows that the table may hold **on each rank**, rounded up to whole buckets. None: the table's
            num_embeddings divided by the number of ranks, rounded up.
        init_capacity: rows **on each rank** to allocate at first. None: max_capacity. A smaller table doubles whenever
            its load factor exceeds max_load_factor, until it reaches max_capacity.
        max_load_factor: load (rows / slots) above which a table that may still grow does so; in (0, 1]. Growth looks at
            the table, not at single buckets: with buckets of 128 slots none is full at a load of 0.5, but with higher
            loads or smaller buckets some are, and evict, before the table has reached its full size.
        global_hbm_for_values, local_hbm_for_values: accepted for compatibility, no effect: rows live on the device.
        evict_strategy: how scores are kept, and with it which row is evicted from a full bucket.
        bucket_capacity: slots per bucket, one of :data:`BUCKET_CAPACITIES`.
        block_size, io_block_size, io_by_cpu, use_constant_memory, num_of_buckets_per_alloc: accepted for compatibility,
            no effect: they tune kernels that do not exist here.
        reserved_key_start_bit: accepted for compatibility, no effect: no key is reserved.
        initializer_args: first values of a row's embedding.
        safe_check_mode: what happens when keys are refused. IGNORE never waits for the device; WARNING and ERROR wait
            once in each training lookup, because refused keys are counted there.
        seed: seed of the initializer. A row's first value depends on (seed, table name, key, column) alone.
        eval_initializer_args: what a key that is not in the table reads as in evaluation. None: zeros. The values come
            from the same generator, so the arguments of ``initializer_args`` give the row that training would insert.

    Raises:
        ConfigError: a value that cannot be honoured; the message names the field, the value and the remedy.
    """

    index_type: torch.dtype = torch.int64
    embedding_dtype: Optional[torch.dtype] = None
    score_type: torch.dtype = torch.int64
    device_id: Optional[int] = None
    dim: Optional[int] = None
    max_capacity: Optional[int] = None
    init_capacity: Optional[int] = None
    max_load_factor: float = 0.5
    global_hbm_for_values: int = 0
    local_hbm_for_values: int = 0
    evict_strategy: DynamicEmbEvictStrategy = DynamicEmbEvictStrategy.LRU
    bucket_capacity: int = 128
    block_size: int = 128
    io_block_size: int = 1024
    io_by_cpu: bool = False
    use_constant_memory: bool = False
    reserved_key_start_bit: int = 0
    num_of_buckets_per_alloc: int = 1
    initializer_args: DynamicEmbInitializerArgs = field(default_factory=DynamicEmbInitializerArgs)
    safe_check_mode: DynamicEmbCheckMode = DynamicEmbCheckMode.IGNORE
    seed: int = 0
    eval_initializer_args: Optional[DynamicEmbInitializerArgs] = None

    def _check(self) -> None:
        self._normalize()
        _require_one_of("index_type", self.index_type, INDEX_DTYPES)
        _require_one_of("score_type", self.score_type, (torch.int64, torch.uint64))
        if self.embedding_dtype is not None:
            _require_one_of("embedding_dtype", self.embedding_dtype, EMBEDDING_DTYPES)
        _require_one_of("bucket_capacity", self.bucket_capacity, BUCKET_CAPACITIES)
        if self.dim is not None:
            check_row_width(self.dim)
        for name in ("max_capacity", "init_capacity"):
            _require_capacity(name, getattr(self, name))
        if not _is_number(self.max_load_factor) or not 0.0 < self.max_load_factor <= 1.0:
            raise ConfigError(f"max_load_factor={self.max_load_factor} is outside (0, 1]; the default is 0.5")
        if self.max_capacity is not None and self.init_capacity is not None and self.init_capacity > self.max_capacity:
            raise ConfigError(
                f"init_capacity={self.init_capacity} is above max_capacity={self.max_capacity}; "
                "lower it, or leave it out to allocate max_capacity at once"
            )
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} is not an integer that fits in 64 bits")
        _require_kind("evict_strategy", self.evict_strategy, DynamicEmbEvictStrategy)
        _require_kind("initializer_args", self.initializer_args, DynamicEmbInitializerArgs)
        if self.eval_initializer_args is not None:
            _require_kind("eval_initializer_args", self.eval_initializer_args, DynamicEmbInitializerArgs)
        _require_kind("safe_check_mode", self.safe_check_mode, DynamicEmbCheckMode)

    def _normalize(self) -> None:
        """What means the same in one form: no number, the default dtype, Python's integers, members of enums."""
        fields = self.__dict__
        for name in ("index_type", "score_type"):
            if fields[name] is None:
                fields[name] = torch.int64
        for name in ("dim", "max_capacity", "init_capacity", "bucket_capacity", "seed"):
            if not isinstance(fields[name], bool) and hasattr(fields[name], "__index__"):  # NumPy's, for one
                fields[name] = operator.index(fields[name])
        for name in ("dim", "max_capacity", "init_capacity", "device_id"):
            if fields[name] == _UNSET and not isinstance(fields[name], float):
                fields[name] = None
        if fields["safe_check_mode"] in tuple(DynamicEmbCheckMode) and not isinstance(fields["safe_check_mode"], bool):
            fields["safe_check_mode"] = DynamicEmbCheckMode(fields["safe_check_mode"])

    def _warn(self, stacklevel: int) -> None:
        for option in dataclasses.fields(self):
            reason = _NO_EFFECT.get(option.name)
            if reason is None or getattr(self, option.name) == option.default or option.name in _warned_fields:
                continue
            if option.name == "score_type" and self.score_type is torch.uint64:
                continue  # the same 64 bits
            _warned_fields.add(option.name)
            warnings.warn(
                f"DynamicEmbTableOptions.{option.name} is accepted for compatibility and has no effect: {reason}",
                DynamicEmbWarning,
                stacklevel=stacklevel,
            )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real)


def _require_one_of(name: str, value: object, allowed: tuple) -> None:
    # Of the same type too: 128.0 equals 128, and no kernel takes it.
    if not any(value == item and type(value) is type(item) for item in allowed):
        raise ConfigError(f"{name}={value} is not supported; use one of {', '.join(str(item) for item in allowed)}")


def _require_kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        choices = f": {', '.join(str(member) for member in kind)}" if issubclass(kind, enum.Enum) else ""
        raise ConfigError(f"{name}={value!r} is not a {kind.__name__}{choices}")


def _require_capacity(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name}={value!r} is not a positive integer")
    if value > MAX_CAPACITY:
        raise ConfigError(f"{name}={value} is above {MAX_CAPACITY}, the most rows that a rank can hold; lower it")
