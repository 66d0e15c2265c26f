"""Whether saved rows can be rows of a table: one rule, in the same words, for files, state dicts and DCP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb.errors import CheckpointError
from dynamicemb.table.config import TableConfig

__all__ = ["SavedTable", "check_fit", "dtype_name", "optimizer_name"]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``, and so on."""
    return str(dtype).removeprefix("torch.")


def optimizer_name(config: TableConfig) -> str:
    """``"rowwise_adagrad"``, and so on: the table's optimizer as files and messages call it."""
    return config.optimizer.kind.name.lower()


@dataclass(frozen=True)
class SavedTable:
    """What decides about a saved table. None: what was saved does not say it.

    Attributes:
        dim: columns.
        dtype: name of the dtype of rows, such as ``float32``.
        evict_strategy: value of the :class:`~dynamicemb.options.DynamicEmbEvictStrategy`.
        optimizer: name of its :class:`~dynamicemb.kernels.layout.OptimizerKind`, in lower case.
        states: float32 values of a row by optimizer state.
    """

    dim: Optional[int] = None
    dtype: Optional[str] = None
    evict_strategy: Optional[str] = None
    optimizer: Optional[str] = None
    states: Optional[Mapping[str, int]] = None


def check_fit(where: str, saved: SavedTable, config: TableConfig, without_optimizer: str = "") -> None:
    """Raises unless rows of ``saved`` can be rows of a table ``config``.

    Args:
        where: begins the message: the place, and the table.
        saved: ``optimizer`` and ``states`` are None where the optimizer is to begin anew.
        config: of the model's table.
        without_optimizer: how to load rows alone, in the imperative; empty: there is no way.

    Raises:
        CheckpointError: they cannot.
    """
    for what, found, expected in (
        ("dim", saved.dim, config.dim),
        ("dtype", saved.dtype, dtype_name(config.embedding_dtype)),
        ("evict_strategy", saved.evict_strategy, config.evict_strategy.value),
    ):
        if found is not None and found != expected:
            raise CheckpointError(f"{where} has {what} {found}, but the model's has {expected}; give the model {found}")
    kind, alternative = optimizer_name(config), f"{without_optimizer}, or " if without_optimizer else ""
    if saved.optimizer not in (None, kind):
        raise CheckpointError(
            f"{where} has the optimizer {saved.optimizer}, but the model's has {kind}; "
            f"{alternative}give the model that optimizer"
        )
    states = {state.name: state.width for state in config.layout.states}
    if saved.states is not None and dict(saved.states) != states:
        remedy = "what was saved is damaged: restore it from a copy"
        if saved.optimizer is None:  # not known to be the same
            remedy = f"{alternative}give the model the optimizer that it was saved with"
        raise CheckpointError(
            f"{where} has the optimizer states {dict(saved.states)}, but {kind} has {states}; {remedy}"
        )
