"""Which optimizer a table has, and its numbers: parsed from torchrec's fused parameters, and checked.

Formulas (``g`` the summed gradient of a row, ``w`` the row, ``t`` the table's count of update steps, all in float32):

* SGD: ``w -= lr * g``
* Adagrad: ``sum += g * g``, then ``w -= lr * g / (sqrt(sum) + eps)`` (``torch.optim.Adagrad`` without ``lr_decay``)
* row-wise Adagrad: ``sum += mean(g * g)``, then as above, one ``sum`` for each row (``torchrec.optim.RowWiseAdagrad``)
* Adam: ``m = b1 * m + (1 - b1) * g``, ``v = b2 * v + (1 - b2) * g * g``, then
  ``w -= lr * (m / (1 - b1**t)) / (sqrt(v / (1 - b2**t)) + eps)``, as ``torch.optim.Adam`` and fbgemm do; only rows of
  the batch change, and ``t`` counts the steps of the table, not of the row.

``weight_decay`` does what it does on fbgemm's tables, so that static and dynamic tables of a collection train alike:

* SGD and Adagrad: nothing, whatever ``weight_decay_mode`` says
* row-wise Adagrad: nothing in mode NONE, which is the default; in mode L2 ``weight_decay * w`` is added to ``g`` before
  all else; in mode DECOUPLE ``w *= 1 - lr * weight_decay`` before the step
* Adam: as in mode DECOUPLE, whatever ``weight_decay_mode`` says

A table says once, by a warning, that it ignores a number or a mode that it was given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch

from dynamicemb.errors import ConfigError, UnknownHyperparameterError
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.update import HyperparameterColumn, WeightDecayMode

__all__ = [
    "HYPERPARAMETERS",
    "OptimizerConfig",
    "hyperparameters_by_fbgemm_name",
    "ignored_parameters",
    "ignored_weight_decay",
    "optimizer_from_fused_params",
]

#: Columns of the hyperparameter tensor (float64 [tables, len(HYPERPARAMETERS)]) that the update kernels read.
HYPERPARAMETERS = tuple(column.name.lower() for column in HyperparameterColumn)

# What fbgemm's update_hyper_parameters takes, and what a dynamic table calls it.
_FBGEMM_NAMES = {
    "lr": "learning_rate", "eps": "eps", "beta1": "beta1", "beta2": "beta2", "weight_decay": "weight_decay",
}  # fmt: skip

# Values of fbgemm's EmbOptimType, by which torchrec names optimizers.
_KIND_BY_NAME = {
    "sgd": OptimizerKind.SGD,
    "exact_sgd": OptimizerKind.SGD,
    "exact_adagrad": OptimizerKind.ADAGRAD,
    "exact_row_wise_adagrad": OptimizerKind.ROWWISE_ADAGRAD,
    "row_wise_adagrad": OptimizerKind.ROWWISE_ADAGRAD,
    "adam": OptimizerKind.ADAM,
}

# What fbgemm's optimizers do with weight decay whatever its mode; those that are not here do what the mode says.
_FIXED_WEIGHT_DECAY = {
    OptimizerKind.SGD: WeightDecayMode.NONE,
    OptimizerKind.ADAGRAD: WeightDecayMode.NONE,
    OptimizerKind.ADAM: WeightDecayMode.DECOUPLE,
}

# Parameters of torchrec's static kernels that cannot change what a dynamic table computes: where rows are kept and
# cached, how ids are checked (no id is out of bounds here), what is measured.
_HARMLESS = frozenset(
    {"cache_algorithm", "cache_load_factor", "cache_sets", "cache_precision", "cache_reserved_memory", "enforce_hbm",
     "prefetch_pipeline", "multipass_prefetch_config", "bounds_check_mode", "record_cache_metrics",
     "gather_uvm_cache_stats", "stats_reporter_config", "uvm_non_rowwise_momentum", "uvm_host_mapped",
     "use_experimental_tbe", "embedding_table_index_type", "embedding_table_offset_type"}
)  # fmt: skip
# Those that others honour, check, or speak of: the sharding, and ignored_parameters.
_ELSEWHERE = frozenset({"dynamicemb_options", "output_dtype", "stochastic_rounding", "weights_precision"})
# Defaults of torch.optim classes and of fbgemm that change nothing; any other value is an option we would have to
# ignore.
_NEUTRAL = {
    "lr_decay": 0, "momentum": None, "dampening": 0, "nesterov": False, "maximize": False, "amsgrad": False,
    "foreach": None, "fused": None, "capturable": False, "differentiable": False, "gradient_clipping": False,
    "max_norm": 0.0, "ensemble_mode": None, "emainplace_mode": None, "counter_based_regularization": None,
    "cowclip_regularization": None, "global_weight_decay": None, "optimizer_state_dtypes": None,
    "extra_optimizer_config": None,
}  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """One table's optimizer.

    Attributes:
        kind: the update rule.
        learning_rate, eps, beta1, beta2, weight_decay: its numbers, as in the formulas above. eps defaults to 1e-8.
        initial_accumulator_value: first value of ``sum`` in both Adagrads.
        weight_decay_mode: as given; see :attr:`applied_weight_decay`.
    """

    kind: OptimizerKind = OptimizerKind.SGD
    learning_rate: float = 0.01
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE

    def hyperparameters(self) -> list[float]:
        """The row of this table in the hyperparameter tensor."""
        return [getattr(self, name) for name in HYPERPARAMETERS]

    @property
    def initial_state(self) -> float:
        """What every optimizer state of a new row starts from."""
        adagrad = self.kind in (OptimizerKind.ADAGRAD, OptimizerKind.ROWWISE_ADAGRAD)
        return self.initial_accumulator_value if adagrad else 0.0

    @property
    def applied_weight_decay(self) -> WeightDecayMode:
        """What the update does with the weight decay, the optimizer's own ways considered."""
        return _FIXED_WEIGHT_DECAY.get(self.kind, self.weight_decay_mode)


def optimizer_from_fused_params(table: str, fused_params: Mapping[str, Any]) -> OptimizerConfig:
    """The optimizer that ``fused_params`` of a table (as torchrec merges them) describe.

    Args:
        table: the table's name, for messages.
        fused_params: torchrec's merged fused parameters: ``optimizer`` (fbgemm's ``EmbOptimType`` or its value; SGD if
            absent, as in fbgemm), ``learning_rate`` (default 0.01), ``eps``, ``beta1``/``beta2`` or ``betas``,
            ``weight_decay``, ``weight_decay_mode`` (fbgemm's ``WeightDecayMode``, its value or its name),
            ``initial_accumulator_value``.

    Raises:
        ConfigError: the optimizer is not one of SGD, Adagrad, RowWiseAdagrad, Adam; a parameter is unknown, or has a
            value that could not be honoured.
    """
    where = f"table '{table}'"
    params = dict(fused_params)
    optimizer = params.pop("optimizer", "exact_sgd")
    kind = _KIND_BY_NAME.get(str(getattr(optimizer, "value", optimizer)))
    if kind is None:
        raise ConfigError(
            f"{where}: optimizer {optimizer} is not supported for dynamic tables; "
            "use SGD, Adagrad, RowWiseAdagrad or Adam"
        )
    if "lr" in params:
        params.setdefault("learning_rate", params.pop("lr"))
    if "betas" in params:
        params["beta1"], params["beta2"] = _betas(where, params.pop("betas"))
    mode = _weight_decay_mode(where, params.pop("weight_decay_mode", WeightDecayMode.NONE))
    numbers: dict[str, float] = {}
    for name, value in params.items():
        if name in _HARMLESS or name in _ELSEWHERE or (name in _NEUTRAL and (not value or value == _NEUTRAL[name])):
            continue
        if name not in (*HYPERPARAMETERS, "initial_accumulator_value"):
            raise ConfigError(
                f"{where}: fused parameter {name}={value!r} cannot be honoured by a dynamic table; remove it "
                f"(known: {', '.join((*HYPERPARAMETERS, 'weight_decay_mode', 'initial_accumulator_value'))})"
            )
        numbers[name] = _checked(where, name, value)
    return OptimizerConfig(kind=kind, weight_decay_mode=mode, **numbers)


def hyperparameters_by_fbgemm_name(where: str, params: Mapping[str, Any]) -> dict[str, float]:
    """Checked numbers by the names in :data:`HYPERPARAMETERS`.

    Args:
        where: the tables, for messages.
        params: as fbgemm's ``update_hyper_parameters`` takes them: ``lr``, ``eps``, ``beta1``, ``beta2``,
            ``weight_decay``.

    Raises:
        UnknownHyperparameterError: there is no hyperparameter of that name.
        ConfigError: a number is out of its range.
    """
    for name in params:
        if name not in _FBGEMM_NAMES:
            raise UnknownHyperparameterError(
                f"{where}: there is no hyperparameter {name!r} to set; known are {', '.join(_FBGEMM_NAMES)}"
            )
    return {_FBGEMM_NAMES[name]: _checked(where, name, value) for name, value in params.items()}


def ignored_weight_decay(table: str, optimizer: OptimizerConfig, weight_decay: float) -> Optional[str]:
    """What to say of a ``weight_decay`` that the table's optimizer does not apply; None if it does, or if it is 0."""
    if weight_decay == 0.0 or optimizer.applied_weight_decay is not WeightDecayMode.NONE:
        return None
    start = f"table '{table}': weight_decay={weight_decay:g} is ignored, as on TorchRec's static tables: "
    if optimizer.kind in _FIXED_WEIGHT_DECAY:
        return (
            f"{start}fbgemm's {_shown(optimizer)} has no weight decay in any mode. Use row-wise Adagrad with "
            "weight_decay_mode L2 or DECOUPLE, or Adam, or remove weight_decay"
        )
    return (
        f"{start}the weight_decay_mode of its {_shown(optimizer)} is NONE, the default. Set weight_decay_mode to L2 or "
        "DECOUPLE, or remove weight_decay"
    )


def ignored_parameters(
    table: str, optimizer: OptimizerConfig, fused_params: Mapping[str, Any], embedding_dtype: torch.dtype
) -> list[str]:
    """What to say of fused parameters that do less for a dynamic table than their names promise, one text for each.

    Args:
        table: the table's name.
        optimizer: what :func:`optimizer_from_fused_params` made of ``fused_params``.
        fused_params: torchrec's merged fused parameters.
        embedding_dtype: of the table's rows.
    """
    texts = []
    if (text := ignored_weight_decay(table, optimizer, optimizer.weight_decay)) is not None:
        texts.append(text)
    mode, applied = optimizer.weight_decay_mode, optimizer.applied_weight_decay
    decays = optimizer.weight_decay != 0.0 and applied is not WeightDecayMode.NONE
    if decays and mode is not applied and "weight_decay_mode" in fused_params:
        texts.append(
            f"table '{table}': weight_decay_mode={mode.name} is ignored, as on TorchRec's static tables: the weight "
            f"decay of fbgemm's {_shown(optimizer)} is decoupled in every mode. Set weight_decay_mode to DECOUPLE, or "
            "remove it"
        )
    # fbgemm rounds stochastically unless it is told not to, and not at all where rows are float32.
    if embedding_dtype is not torch.float32 and fused_params.get("stochastic_rounding", True):
        texts.append(_lost_updates(table, embedding_dtype))
    return texts


def _lost_updates(table: str, embedding_dtype: torch.dtype) -> str:
    # The distance to the next number is eps / 2 to eps of a value, and half of it is lost.
    eps, dtype = torch.finfo(embedding_dtype).eps, str(embedding_dtype).removeprefix("torch.")
    return (
        f"table '{table}': stochastic_rounding, which fbgemm's static tables have unless told otherwise, has no effect "
        f"on a dynamic table: its {dtype} rows are rounded to nearest, and an update of less than {eps / 4:.2%} to "
        f"{eps / 2:.2%} of a value is lost. Use embedding_dtype=torch.float32 to keep small updates, or set "
        "stochastic_rounding=False in fused_params to round static tables to nearest too"
    )


def _shown(optimizer: OptimizerConfig) -> str:
    return {OptimizerKind.SGD: "SGD", OptimizerKind.ROWWISE_ADAGRAD: "row-wise Adagrad"}.get(
        optimizer.kind, optimizer.kind.name.title()
    )


def _betas(where: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ConfigError(f"{where}: betas={value!r}; give the two of them, such as (0.9, 0.999)")
    return value[0], value[1]


def _weight_decay_mode(where: str, value: Any) -> WeightDecayMode:
    """From fbgemm's enum, one of its values or names, or None for the default."""
    name = "NONE" if value is None else getattr(value, "name", value)
    for mode in WeightDecayMode:
        if str(name).upper() == mode.name or (name == mode and not isinstance(name, bool)):
            return mode
    raise ConfigError(
        f"{where}: fused parameter weight_decay_mode={value!r} cannot be honoured by a dynamic table; use NONE, L2 or "
        "DECOUPLE of fbgemm's WeightDecayMode"
    )


def _checked(where: str, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{where}: {name}={value!r} is not a number") from None
    upper = 1.0 if name in ("beta1", "beta2") else math.inf
    if not 0.0 <= number < upper:
        raise ConfigError(f"{where}: {name}={value!r} is outside [0, {upper:g})")
    return number
