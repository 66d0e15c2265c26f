"""``{table}_opt_args.json``: optimizer, eviction strategy and a few numbers, in NVIDIA's words and in ours."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from dynamicemb.checkpoint.files.manifest import OptimizerRecord, TableRecord
from dynamicemb.checkpoint.formats.exchange import described, record_from
from dynamicemb.errors import CheckpointError
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["EITHER_ADAGRAD", "OptArgs", "opt_args_of", "read_opt_args", "state_widths"]

_KIND_BY_OPT_TYPE = {
    "sgd": "sgd",
    "exact_sgd": "sgd",
    "adam": "adam",
    "exact_adagrad": "adagrad",
    "exact_row_wise_adagrad": "rowwise_adagrad",
}
_OPT_TYPE_BY_KIND = {
    "sgd": "sgd",
    "adam": "adam",
    "adagrad": "exact_adagrad",
    "rowwise_adagrad": "exact_row_wise_adagrad",
}
_OUR_NAME = {
    "lr": "learning_rate",
    "eps": "eps",
    "beta1": "beta1",
    "beta2": "beta2",
    "weight_decay": "weight_decay",
    "initial_accumulator_value": "initial_accumulator_value",
}
#: What their loader insists on, by optimizer.
_WRITTEN = {
    "sgd": ("lr",),
    "adam": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "adagrad": ("lr", "eps", "initial_accumulator_value"),
    "rowwise_adagrad": ("lr", "eps", "initial_accumulator_value"),
}
_STRATEGIES = {
    "klru": "lru", "lru": "lru", "klfu": "lfu", "lfu": "lfu", "kcustomized": "customized", "customized": "customized",
}  # fmt: skip
_STRATEGY_NAME = {"lru": "EvictStrategy.KLru", "lfu": "EvictStrategy.KLfu", "customized": "EvictStrategy.KCustomized"}
#: Kind of an optimizer whose numbers both Adagrads have; the width of its state tells which one it is.
EITHER_ADAGRAD = "adagrad or rowwise_adagrad"
#: Name of the field that holds what NVIDIA's files have no place for; their loader takes no notice of it.
_OURS = "dynamicemb_record"


@dataclass(frozen=True)
class OptArgs:
    """The file's content.

    Attributes:
        optimizer: None: it tells of none. Its kind may be :data:`EITHER_ADAGRAD`.
        evict_strategy: None: it names none.
        step_score: the score that touched keys get, where the user or a step counter sets it.
        ours: the table's record, where dynamicemb wrote the dump.
    """

    optimizer: Optional[OptimizerRecord] = None
    evict_strategy: Optional[str] = None
    step_score: int = 0
    ours: Optional[TableRecord] = None


def state_widths(kind: str, width: int, dim: int) -> Optional[int]:
    """Columns of ``width`` in a file that are state, for a table of ``dim``; None if ``kind`` cannot have ``width``.

    Row-wise Adagrad keeps one number for each row, but some versions dump it with the padding to 16 bytes that it has
    in memory: 4 columns of a float32 table, 8 of a float16 one. The number is the first.
    """
    if kind == "rowwise_adagrad":
        return 1 if width in (1, 4, 8) else None
    expected = {"sgd": 0, "adam": 2 * dim, "adagrad": dim}[kind]
    return expected if width == expected else None


def read_opt_args(path: Path) -> OptArgs:
    """Reads ``path``, every field checked.

    Raises:
        CheckpointError: it is malformed, or names an optimizer or a strategy that is not known here.
    """
    remedy = "restore the file from a copy"
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}, offset {error.pos}: not JSON ({error.msg}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}, offset {error.start}: not UTF-8; {remedy}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {remedy}") from error
    if not isinstance(args, dict):
        raise CheckpointError(f"{path}: not a JSON object; {remedy}")
    ours = None if _OURS not in args else record_from(path, _OURS, args[_OURS])
    step_score = _integer(path, args, "step_score", -(2**63)) if args.get("step_score") is not None else 0
    return OptArgs(_optimizer(path, args), _strategy(path, args), step_score, ours)


def _optimizer(path: Path, args: dict[str, Any]) -> Optional[OptimizerRecord]:
    kind: Optional[str]
    if "opt_type" in args:
        kind = _KIND_BY_OPT_TYPE.get(str(args["opt_type"]))
    elif "lr" not in args:
        return None
    else:  # The first versions name no optimizer, but write its numbers.
        kind = "adam" if "beta1" in args else EITHER_ADAGRAD if "initial_accumulator_value" in args else "sgd"
    if kind is None:
        raise CheckpointError(
            f"{path}: opt_type is {args['opt_type']!r}; known are {', '.join(_KIND_BY_OPT_TYPE)}: dump the table "
            "without optimizer state"
        )
    numbers = {ours: _number(path, args, theirs) for theirs, ours in _OUR_NAME.items() if theirs in args}
    steps = _integer(path, args, "iters", 0) if "iters" in args else 0
    return OptimizerRecord(kind, saved=True, steps=steps, hyperparameters=numbers)


def _strategy(path: Path, args: dict[str, Any]) -> Optional[str]:
    if args.get("evict_strategy") is None:
        return None
    name = str(args["evict_strategy"])
    strategy = _STRATEGIES.get(name.rpartition(".")[2].lower())
    if strategy is None:
        raise CheckpointError(
            f"{path}: evict_strategy is {name!r}, whose scores have no meaning here; known are "
            f"{', '.join(_STRATEGY_NAME.values())}: dump the table with one of them"
        )
    return strategy


def _number(path: Path, args: dict[str, Any], name: str) -> float:
    value = args[name]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {name} is {value!r}, not a finite number; restore the file from a copy")
    return float(value)


def _integer(path: Path, args: dict[str, Any], name: str, lower: int) -> int:
    value = args[name]
    if type(value) is not int or not lower <= value < 2**63:
        raise CheckpointError(
            f"{path}: {name} is {value!r}, not an integer from {lower} to 2**63 - 1; restore the file from a copy"
        )
    return value


def opt_args_of(record: TableRecord) -> dict[str, Any]:
    """The file's content for a table of ours. What a record does not tell gets the default of our optimizers."""
    optimizer = record.optimizer
    defaults = OptimizerConfig(OptimizerKind[optimizer.kind.upper()])
    args: dict[str, Any] = {"opt_type": _OPT_TYPE_BY_KIND[optimizer.kind]}
    for theirs in _WRITTEN[optimizer.kind]:
        ours = _OUR_NAME[theirs]
        args[theirs] = optimizer.hyperparameters.get(ours, getattr(defaults, ours))
    if optimizer.kind == "adam":
        args["iters"] = optimizer.steps
    args["evict_strategy"] = _STRATEGY_NAME[record.evict_strategy]
    args["dist_type"] = "roundrobin"
    if record.evict_strategy == "customized":
        args["step_score"] = record.custom_score
    return {**args, _OURS: described(record)}
