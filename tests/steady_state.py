"""What a step does to a device, found out without one: kernels that it launches, and points where the host would wait.

The step runs on meta tensors, which take the path of a GPU: the Triton engine, whose launches are recorded in place of
running. A meta tensor has no values, so whatever reads one on the host (a number, a list, a mask turned into indices,
a size that depends on values) raises, whoever does it. What does not raise is a copy from the host to the device, so
every operation of torch is looked at as well, and every call that makes a tensor of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamicemb.kernels.launch import Launch, intercepted
from dynamicemb.table.storage import Chunk

__all__ = ["META", "Step", "meta_memory", "recorded"]

META = torch.device("meta")

#: Their result, or its size, depends on values: on a GPU the host waits for it.
_READS = {
    "_local_scalar_dense", "_unique", "_unique2", "allclose", "bincount", "equal", "histc", "is_nonzero", "item",
    "masked_select", "nonzero", "nonzero_numpy", "unique_consecutive", "unique_dim", "unique_dim_consecutive",
}  # fmt: skip
#: They make tensors of what the host has.
_FROM_HOST = [
    (torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (torch, "from_numpy"), (torch, "frombuffer"),
    (torch.Tensor, "new_tensor"), (torch.Tensor, "__getitem__"), (torch.Tensor, "__setitem__"),
]  # fmt: skip
#: They take memory or describe it; views are told by their schemas.
_NO_KERNEL = {
    "_unsafe_view", "empty", "empty_like", "empty_permuted", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "record_stream",
}  # fmt: skip


class Step(TorchDispatchMode):
    """Looks at every operation of torch inside ``with``, the backward pass included.

    Attributes:
        kernels: what runs on the device, in order: operations of torch (some of which are several kernels, but the same
            ones whatever the sizes), Triton kernels, collectives.
        waits: operations that would make the host wait for the device, or copy between the two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        # Noted before the call, which may raise.
        if name in _READS or name == "lift_fresh" or _has_size_to_be_read(name, func, args, kwargs):
            self.waits.append(str(func))
        if namespace not in ("prim", "profiler") and name not in _NO_KERNEL and not _is_view(func):
            self.kernels.append(str(func))
        result = func(*args, **kwargs)
        if len({leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}) > 1:
            self.waits.append(str(func))
        return result


def _has_size_to_be_read(name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    if name == "repeat_interleave":
        return func._overloadname == "Tensor" and kwargs.get("output_size") is None
    masks = (torch.bool, torch.uint8)
    return name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        isinstance(index, torch.Tensor) and index.dtype in masks for index in tree_leaves(args[1])
    )


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def recorded() -> Iterator[Step]:
    """Records the block, Triton kernels included, which do not run."""
    step = Step()

    def note(launch: Launch) -> None:
        step.kernels.append(f"triton.{launch.kernel.__name__}")

    with intercepted(note), _host_numbers_noted(step), step:
        yield step


@contextmanager
def _host_numbers_noted(step: Step) -> Iterator[None]:
    """Notes where numbers of the host become a tensor: on a GPU a copy from memory that is not pinned, for which the
    host may wait; for a meta tensor torch leaves the copy out. A mode for functions of torch would not see what a
    backward pass calls."""

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if not name.endswith("item__") or _takes_numbers(args):
                step.waits.append(name)
            return function(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _FROM_HOST:
            patch.setattr(owner, name, noting(name, getattr(owner, name)))
        yield


def _takes_numbers(item: tuple) -> bool:
    """Whether an index is a list, which becomes a tensor, or what is assigned is a number, which is copied where a
    single element is meant."""
    index = item[1] if isinstance(item[1], tuple) else (item[1],)
    assigns_number = len(item) == 3 and not isinstance(item[2], torch.Tensor)
    return assigns_number or any(isinstance(part, (list, range)) for part in index)


@contextmanager
def meta_memory() -> Iterator[None]:
    """Inside the block, tables can be made on the meta device, where memory has no addresses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chunk, "addresses", lambda chunk: [0, 0, 0, 0])
        yield
