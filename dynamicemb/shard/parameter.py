"""The parameter that stands for a dynamic table: without rows, and aware of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dynamicemb.errors import ConfigError

__all__ = ["TableParameter"]

#: Change no values, in spite of their names.
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_"})
#: They and views show the same memory as another tensor: writing to the result is writing to the parameter.
_SHOW_SAME_MEMORY = (torch.Tensor.data.__get__, torch.Tensor.detach, torch.detach)  # type: ignore[attr-defined]


class _Guarded(torch.Tensor):
    """A tensor of no rows whose memory is that of a table's parameter; writing to it raises a ``ConfigError``.

    A hash table has rows for ids that have been met, and they are not in this tensor: whatever is written here would
    be lost without a word. A change of ``requires_grad``, ``grad``, device or dtype is none of the values, and goes on
    as for any parameter.
    """

    _table: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if isinstance(tensor, _Guarded):
                raise ConfigError(
                    f"table '{tensor._table}' is dynamic: its rows are in a hash table, not in its parameter, where "
                    f"{_shown(func)} would write. First values of rows are set by "
                    "initializer_args in its DynamicEmbTableOptions; reset_parameters() of the sharded collection "
                    "empties its tables; rows are loaded by DynamicEmbLoad, load_state_dict or "
                    "dynamicemb.checkpoint.static.load_static. Leave this parameter out"
                )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and (func in _SHOW_SAME_MEMORY or result._is_view()):
                result = result.as_subclass(_Guarded)
                result._table = next(tensor._table for tensor in _flat(args) if isinstance(tensor, _Guarded))
        return result


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What ``func`` would give other values."""
    name = getattr(func, "__name__", "")
    # Some of torch's initializers look at the shape and do nothing, without an operation that would tell.
    compiling = torch.compiler.is_compiling()  # a compiler cannot look at frames
    if getattr(func, "__module__", None) == nn.init.__name__ or (
        not compiling and _caller_module() == nn.init.__name__
    ):
        return [*args, *kwargs.values()]
    written = _flat(kwargs.get("out"))
    if name == "__set__" and getattr(func, "__self__", None) is torch.Tensor.data:
        # Module.to() puts the parameter's own memory, converted, in its place: as empty as before.
        return [] if args[1].numel() == 0 else list(args[:1])
    if name == "copy_" and args[1] is args[0]:
        return written  # what Module.load_state_dict does, which has been given the parameter itself
    in_place_operator = name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__invert__")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    if in_place or in_place_operator or name == "__setitem__":
        written += _flat(args[0] if args else next(iter(kwargs.values()), None))
    return written


def _shown(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    return "an assignment" if name.startswith("__set") else name if name.endswith("_") else "torch.nn.init"


def _caller_module() -> str:
    """The module whose code called the function that a ``__torch_function__`` was asked for."""
    if torch.compiler.is_compiling():  # which has no frames
        return ""
    return sys._getframe(3).f_globals.get("__name__", "")


def _flat(value: Any) -> list[Any]:
    """``value``, or what is in it if it is a list or a tuple."""
    return [part for item in value for part in _flat(item)] if isinstance(value, (list, tuple)) else [value]


class TableParameter(_Guarded, nn.Parameter):
    """The parameter of a dynamic table, [0, dim]: for its name, its ``requires_grad`` and its optimizer.

    Args:
        table: the table's name.
        dim: its columns.
        device: where the table is.
        requires_grad: whether the table takes updates.
    """

    def __new__(cls, table: str, dim: int, device: torch.device, requires_grad: bool = True) -> TableParameter:
        return cls._of(table, torch.empty(0, dim, device=device), requires_grad)

    @classmethod
    def _of(cls, table: str, data: torch.Tensor, requires_grad: bool) -> TableParameter:
        parameter = torch.Tensor._make_subclass(cls, data, requires_grad)
        parameter._table = table
        return parameter

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter of dynamic table '{self._table}', whose rows are in its hash table (dim={self.shape[1]})"

    def __deepcopy__(self, memo: dict[int, Any]) -> TableParameter:
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                memo[id(self)] = self._of(self._table, self.data.clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)
