"""What torchrec sees of the optimizers that run in the backward pass."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torchrec.optim.fused import FusedOptimizer

from dynamicemb.errors import ConfigError, DynamicEmbWarning
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import hyperparameters_by_fbgemm_name, ignored_weight_decay

__all__ = ["DynamicFusedOptimizer"]


class DynamicFusedOptimizer(FusedOptimizer):
    """Optimizer of one group of tables: a parameter group for each table, whose ``lr`` can be changed at any time.

    The updates themselves happen in the backward pass. As with torchrec's own fused optimizers, a changed ``lr`` is
    passed on by :meth:`zero_grad` and by :meth:`step`. Two things differ from them:

    * They have one parameter group for all tables that share a kernel; here each table has its own. The ``lr`` of the
      first parameter group is that of the first table alone: set that of every group, as schedulers do, or call
      :meth:`update_hyper_parameters`, which reaches all tables.
    * A ``lr`` that was set by their ``update_hyper_parameters`` lasts until the next ``zero_grad`` or ``step``, which
      pass on that of the parameter group again. Here the parameter groups show it, and it stays.

    Args:
        group: the tables.
        parameters: a tensor by ``<table>.weight`` that stands for the table, in the order of the group's tables.
    """

    def __init__(self, group: TableGroup, parameters: dict[str, torch.Tensor]) -> None:
        self._group = group
        self._applied = [config.optimizer.learning_rate for config in group.configs]
        self._told: set[str] = set()
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

    def zero_grad(self, set_to_none: bool = False) -> None:
        """There are no gradients to clear; passes on changed learning rates."""
        self.step()

    def restore_learning_rate(self, table: int, learning_rate: float) -> None:
        """Shows the learning rate that a table has got from a checkpoint."""
        self.param_groups[table]["lr"] = self._applied[table] = learning_rate

    def update_hyper_parameters(self, params_dict: Mapping[str, Any]) -> None:
        """Sets hyperparameters of all tables of the group; they take effect with the next update.

        Args:
            params_dict: numbers by the names that fbgemm's ``update_hyper_parameters`` takes: ``lr``, ``eps``,
                ``beta1``, ``beta2``, ``weight_decay``; and ``lower_bound``, which belongs to a mode of weight decay
                that dynamic tables do not have, and is ignored with a warning.

        Raises:
            UnknownHyperparameterError: a name is not one of these. Nothing has changed.
            ConfigError: a number is out of its range. Nothing has changed.
        """
        named = {name: value for name, value in params_dict.items() if name != "lower_bound"}
        numbers = hyperparameters_by_fbgemm_name(self._where, named)
        if len(named) < len(params_dict):
            self._tell_once(
                f"{self._where}: lower_bound is ignored; it belongs to WeightDecayMode.DECOUPLE_GLOBAL, which dynamic "
                "tables do not have"
            )
        self._group.set_hyperparameters(numbers)
        if "learning_rate" in numbers:
            for table in range(len(self._applied)):
                self.restore_learning_rate(table, numbers["learning_rate"])
        for config in self._group.configs if numbers.get("weight_decay") else ():
            if (text := ignored_weight_decay(config.name, config.optimizer, numbers["weight_decay"])) is not None:
                self._tell_once(text, f"{config.name}: weight_decay")

    def set_optimizer_step(self, step: int) -> None:
        """Sets how many updates the tables have had, as Adam's bias correction counts them.

        Args:
            step: the next update is number ``step + 1``.

        Raises:
            ConfigError: it is not a whole number of at least 0. Nothing has changed.
        """
        try:
            steps = operator.index(step)
        except TypeError:
            steps = -1
        if steps < 0 or isinstance(step, bool):
            raise ConfigError(f"{self._where}: optimizer step {step!r} is not a whole number of at least 0")
        self._group.set_steps(steps)

    @property
    def _where(self) -> str:
        names = ", ".join(f"'{config.name}'" for config in self._group.configs)
        return f"table {names}" if len(self._group.configs) == 1 else f"tables {names}"

    def _tell_once(self, text: str, subject: str = "") -> None:
        if (subject or text) not in self._told:
            self._told.add(subject or text)
            warnings.warn(text, DynamicEmbWarning, stacklevel=3)
