"""The optimizer's step, fused with the sum of equal keys' gradients. Formulas: :mod:`dynamicemb.table.optimizers`."""

from __future__ import annotations

import enum
from typing import Optional

import torch

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView, UniqueKeys

__all__ = ["HyperparameterColumn", "WeightDecayMode", "update"]


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


def update(
    view: GroupView,
    unique: UniqueKeys,
    slots: torch.Tensor,
    gradients: torch.Tensor,
    hyperparameters: torch.Tensor,
    steps: torch.Tensor,
    weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE,
    takes_step: Optional[torch.Tensor] = None,
) -> None:
    """One optimizer step: counts it, and updates the row of each distinct key once.

    The gradients of a key are summed as :mod:`~dynamicemb.kernels.segment_sum` does.

    Args:
        view: the tables; rows change. ``view.layout.optimizer`` picks the rule.
        unique: the batch.
        slots: int64 [U]; keys with a negative slot are passed over.
        gradients: float32, float16 or bfloat16 [N, dim], contiguous.
        hyperparameters: float64 [T, 5], see :class:`HyperparameterColumn`. Kernels round them, ``1 - beta`` and
            ``1 - beta ** t`` (:mod:`~dynamicemb.kernels.steps`) to float32: ``1 - 0.999`` taken in float32 would be
            off by 1.3e-5.
        steps: int64 [T], update steps of each table; one more afterwards (Adam's ``t``), also for an empty batch.
        weight_decay_mode: of all tables; each has its own number.
        takes_step: bool [T], whose count of steps goes on; keys of other tables must have negative slots. None: all.
            Does not synchronise.
    """
    engine = implementation(__name__, view.device)
    engine.update(view, unique, slots, gradients, hyperparameters, steps, weight_decay_mode, takes_step)
