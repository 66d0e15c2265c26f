"""The optimizer's step, fused with the sum of equal keys' gradients. Formulas: :mod:`dynamicemb.table.optimizers`."""

from __future__ import annotations

import enum

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView, UniqueKeys

__all__ = ["HyperparameterColumn", "WeightDecayMode", "bias_corrections", "update"]


class HyperparameterColumn(enum.IntEnum):
    """Columns of the hyperparameter tensor, float64 [T, 5]."""

    LEARNING_RATE = 0
    EPS = 1
    BETA1 = 2
    BETA2 = 3
    WEIGHT_DECAY = 4


class WeightDecayMode(enum.IntEnum):
    """What a step does with the table's ``weight_decay``; the numbers are those of fbgemm's enum of this name."""

    #: Nothing.
    NONE = 0
    #: ``weight_decay * w`` is added to the gradient before all else.
    L2 = 1
    #: The row is multiplied by ``1 - learning_rate * weight_decay`` before the step.
    DECOUPLE = 2


def bias_corrections(hyperparameters: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Adam's ``1 - beta ** t`` for both betas, once for each table and the same for both engines.

    Args:
        hyperparameters: float64 [T, 5].
        steps: int64 [T].

    Returns:
        float32 [T, 2], computed in float64. Does not synchronise.
    """
    betas = hyperparameters[:, HyperparameterColumn.BETA1 : HyperparameterColumn.BETA2 + 1]
    return (1.0 - betas ** steps.double()[:, None]).float()


def update(
    view: GroupView,
    unique: UniqueKeys,
    slots: torch.Tensor,
    gradients: torch.Tensor,
    hyperparameters: torch.Tensor,
    steps: torch.Tensor,
    weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE,
) -> None:
    """Sums the gradients of each distinct key as :mod:`~dynamicemb.kernels.segment_sum` does, and updates its row once.

    Args:
        view: the tables; rows change. ``view.layout.optimizer`` picks the rule.
        unique: the batch.
        slots: int64 [U]; keys with a negative slot are passed over.
        gradients: float32, float16 or bfloat16 [N, dim], contiguous.
        hyperparameters: float64 [T, 5], see :class:`HyperparameterColumn`. Kernels round them, ``1 - beta`` and
            ``1 - beta ** t`` to float32: ``1 - 0.999`` taken in float32 would be off by 1.3e-5.
        steps: int64 [T], update steps of each table, this one included (Adam's ``t``). Does not synchronise.
        weight_decay_mode: of all tables; each has its own number.
    """
    engine = implementation(__name__, view.device)
    engine.update(view, unique, slots, gradients, hyperparameters, steps, weight_decay_mode)
