"""What torchrec sees of the optimizers that run in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torchrec.optim.fused import FusedOptimizer

from dynamicemb.table.group import TableGroup

__all__ = ["DynamicFusedOptimizer"]


class DynamicFusedOptimizer(FusedOptimizer):
    """Optimizer of one group of tables: a parameter group for each table, whose ``lr`` can be changed at any time.

    The updates themselves happen in the backward pass. As with torchrec's own fused optimizers, a changed ``lr`` is
    passed on by :meth:`zero_grad` and by :meth:`step`.

    Args:
        group: the tables.
        parameters: an (empty) parameter by ``<table>.weight``, in the order of the group's tables.
    """

    def __init__(self, group: TableGroup, parameters: dict[str, torch.nn.Parameter]) -> None:
        self._group = group
        self._applied = [config.optimizer.learning_rate for config in group.configs]
        param_groups = [
            {"params": [parameter], "lr": learning_rate}
            for parameter, learning_rate in zip(parameters.values(), self._applied, strict=True)
        ]
        super().__init__(parameters, {}, param_groups)

    def step(self, closure: Any = None) -> None:
        """Passes on changed learning rates; the rows have been updated by the backward pass."""
        for table, param_group in enumerate(self.param_groups):
            learning_rate = float(param_group["lr"])
            if learning_rate != self._applied[table]:
                self._group.set_learning_rate(table, learning_rate)
                self._applied[table] = learning_rate

    def restore_learning_rate(self, table: int, learning_rate: float) -> None:
        """Shows the learning rate that a table has got from a checkpoint."""
        self.param_groups[table]["lr"] = self._applied[table] = learning_rate

    def zero_grad(self, set_to_none: bool = False) -> None:
        """There are no gradients to clear; passes on changed learning rates."""
        self.step()
