"""Which optimizer a table has, and its numbers: parsed from torchrec's fused parameters, checked once.

Formulas (``g`` the summed gradient of a row, ``w`` the row, ``t`` the table's count of update steps, all in float32):

* SGD: ``w -= lr * g``
* Adagrad: ``sum += g * g``, then ``w -= lr * g / (sqrt(sum) + eps)`` (``torch.optim.Adagrad`` without ``lr_decay``)
* row-wise Adagrad: ``sum += mean(g * g)``, then as above, one ``sum`` for each row (``torchrec.optim.RowWiseAdagrad``)
* Adam: ``m = b1 * m + (1 - b1) * g``, ``v = b2 * v + (1 - b2) * g * g``, then
  ``w -= lr * (m / (1 - b1**t)) / (sqrt(v / (1 - b2**t)) + eps)``, as ``torch.optim.Adam`` and fbgemm do; only rows of
  the batch change, and ``t`` counts the steps of the table, not of the row.

``weight_decay`` adds ``weight_decay * w`` to ``g`` for SGD and both Adagrads (L2, as ``torch.optim`` does); for Adam it
adds ``weight_decay * w`` to the quotient that ``lr`` multiplies (decoupled, as fbgemm does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamicemb.errors import ConfigError
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.update import HyperparameterColumn

__all__ = ["HYPERPARAMETERS", "OptimizerConfig", "optimizer_from_fused_params"]

#: Columns of the hyperparameter tensor (float64 [tables, len(HYPERPARAMETERS)]) that the update kernels read.
HYPERPARAMETERS = tuple(column.name.lower() for column in HyperparameterColumn)

# Values of fbgemm's EmbOptimType, by which torchrec names optimizers.
_KIND_BY_NAME = {
    "sgd": OptimizerKind.SGD,
    "exact_sgd": OptimizerKind.SGD,
    "exact_adagrad": OptimizerKind.ADAGRAD,
    "exact_row_wise_adagrad": OptimizerKind.ROWWISE_ADAGRAD,
    "row_wise_adagrad": OptimizerKind.ROWWISE_ADAGRAD,
    "adam": OptimizerKind.ADAM,
}

# Parameters of torchrec's static kernels that say nothing about the optimizer of a dynamic table.
_NOT_OURS = frozenset(
    {"cache_algorithm", "cache_load_factor", "cache_precision", "cache_reserved_memory", "enforce_hbm",
     "prefetch_pipeline", "multipass_prefetch_config", "bounds_check_mode", "stochastic_rounding", "output_dtype",
     "weights_precision", "dynamicemb_options"}
)  # fmt: skip
# Defaults of torch.optim classes that change nothing; any other value is an option we would have to ignore.
_NEUTRAL = {
    "lr_decay": 0, "momentum": None, "dampening": 0, "nesterov": False, "maximize": False, "amsgrad": False,
    "foreach": None, "fused": None, "capturable": False, "differentiable": False,
}  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """One table's optimizer.

    Attributes:
        kind: the update rule.
        learning_rate, eps, beta1, beta2, weight_decay: its numbers, as in the formulas above. eps defaults to 1e-8.
        initial_accumulator_value: first value of ``sum`` in both Adagrads.
    """

    kind: OptimizerKind = OptimizerKind.SGD
    learning_rate: float = 0.01
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0

    def hyperparameters(self) -> list[float]:
        """The row of this table in the hyperparameter tensor."""
        return [getattr(self, name) for name in HYPERPARAMETERS]

    @property
    def initial_state(self) -> float:
        """What every optimizer state of a new row starts from."""
        adagrad = self.kind in (OptimizerKind.ADAGRAD, OptimizerKind.ROWWISE_ADAGRAD)
        return self.initial_accumulator_value if adagrad else 0.0


def optimizer_from_fused_params(table: str, fused_params: Mapping[str, Any]) -> OptimizerConfig:
    """The optimizer that ``fused_params`` of a table (as torchrec merges them) describe.

    Args:
        table: the table's name, for messages.
        fused_params: torchrec's merged fused parameters: ``optimizer`` (fbgemm's ``EmbOptimType`` or its value; SGD if
            absent, as in fbgemm), ``learning_rate`` (default 0.01), ``eps``, ``beta1``/``beta2`` or ``betas``,
            ``weight_decay``, ``initial_accumulator_value``.

    Raises:
        ConfigError: the optimizer is not one of SGD, Adagrad, RowWiseAdagrad, Adam; a parameter is unknown, or has a
            value that could not be honoured.
    """
    params = dict(fused_params)
    optimizer = params.pop("optimizer", "exact_sgd")
    kind = _KIND_BY_NAME.get(str(getattr(optimizer, "value", optimizer)))
    if kind is None:
        raise ConfigError(
            f"table '{table}': optimizer {optimizer} is not supported for dynamic tables; "
            "use SGD, Adagrad, RowWiseAdagrad or Adam"
        )
    if "lr" in params:
        params.setdefault("learning_rate", params.pop("lr"))
    if "betas" in params:
        params["beta1"], params["beta2"] = params.pop("betas")
    numbers: dict[str, float] = {}
    for name, value in params.items():
        if name in _NOT_OURS or (name in _NEUTRAL and (not value or value == _NEUTRAL[name])):
            continue
        if name == "weight_decay_mode" and getattr(value, "name", str(value)).upper() in ("NONE", "L2"):
            continue
        if name not in OptimizerConfig.__dataclass_fields__ or name == "kind":
            raise ConfigError(
                f"table '{table}': fused parameter {name}={value!r} cannot be honoured by a dynamic table; remove it "
                f"(known: {', '.join((*HYPERPARAMETERS, 'initial_accumulator_value'))})"
            )
        numbers[name] = _checked(table, name, value)
    return OptimizerConfig(kind=kind, **numbers)


def _checked(table: str, name: str, value: Any) -> float:
    number = float(value)
    upper = 1.0 if name in ("beta1", "beta2") else math.inf
    if not 0.0 <= number < upper:
        raise ConfigError(f"table '{table}': {name}={value} is outside [0, {upper:g})")
    return number
