"""The model of ``dump`` and ``load``: from ``--model package.module:function`` to a sharded model on every rank."""

from __future__ import annotations

import datetime
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dynamicemb.cli.launch import RANK_VARIABLE, launch
from dynamicemb.cli.quiet import quieten_libraries
from dynamicemb.errors import ConfigError, DynamicEmbError, RemoteRankError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CollectionNames",
    "ModelName",
    "Optim",
    "RankCount",
    "TableNames",
    "chosen_tables",
    "is_first_rank",
    "on_ranks",
    "renamed_collections",
    "sharded_model",
]

#: Set in the store of the process group when rank 0 has said why it ends.
_SAID = "dynamicemb/error is said"
#: How long other ranks wait for that; longer than a rank that has an error needs to say it.
_PATIENCE = datetime.timedelta(seconds=2)

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FUNCTION",
        show_default=False,
        help="A function without arguments that returns the sharded model. The current folder is searched first.",
    ),
]
TableNames = Annotated[
    Optional[list[str]],
    typer.Option(
        "--tables",
        metavar="[COLLECTION=]NAME,...",
        show_default=False,
        help="Only these tables, such as model.embeddings=item,user or item,user; may be repeated. Default: all.",
    ),
]
CollectionNames = Annotated[
    Optional[list[str]],
    typer.Option(
        "--collection",
        metavar="MODEL=CHECKPOINT",
        show_default=False,
        help="Where the checkpoint has a collection of the model, such as model=model.net; may be repeated.",
    ),
]
RankCount = Annotated[
    Optional[int],
    typer.Option(
        "--ranks",
        min=1,
        metavar="N",
        show_default=False,
        help="Start N ranks on this machine, as torchrun does. Without it, and without torchrun: one.",
    ),
]
Optim = Annotated[bool, typer.Option("--optim", help="With the optimizer's state.")]


def is_first_rank() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get(RANK_VARIABLE, "0") == "0"


def on_ranks(ranks: Optional[int]) -> None:
    """With ``--ranks``, runs the command in so many processes, and ends with their exit code; in one of those, nothing.

    Raises:
        typer.Exit: the ranks have ended.
        typer.BadParameter: torchrun has started another number.
    """
    if ranks is None:
        return
    if RANK_VARIABLE not in os.environ:
        raise typer.Exit(launch(ranks, ["-m", "dynamicemb", *sys.argv[1:]]))
    if os.environ.get("WORLD_SIZE") != str(ranks):
        started = os.environ.get("WORLD_SIZE")
        raise typer.BadParameter(f"{ranks}, but torchrun has started {started}; leave it out", param_hint="--ranks")


@contextmanager
def sharded_model(name: str) -> Iterator[nn.Module]:
    """The model that the function called ``name`` returns, and the default process group while it is used.

    If the module has made no process group when it is imported, one is made from the environment that ``torchrun`` sets
    (NCCL where there are GPUs, else gloo); without ``torchrun``, of this process alone. A function that asks for the
    default group itself gets that one.

    Raises:
        typer.Exit: with exit code 1 instead of a DynamicEmbError, once rank 0 has said what it was. The others end
            without a word if the error came from what all ranks do together, of which rank 0 knows.
        typer.BadParameter: there is no such function, or it returns no module.
    """
    import torch.distributed as dist

    from dynamicemb.cli.console import warn
    from dynamicemb.planner.gloo import let_threads_finish_at_exit

    quieten_libraries()
    try:
        model = _made(name)
    except DynamicEmbError as error:
        if not is_first_rank() and not isinstance(error, RemoteRankError):
            warn("error", f"rank {os.environ['RANK']}: {error}")
        raise _failure(error) from None
    finally:
        let_threads_finish_at_exit(dist.group.WORLD)
    try:
        yield model
    except DynamicEmbError as error:
        raise _failure(error) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def _failure(error: DynamicEmbError) -> typer.Exit:
    """Says what happened on rank 0. torchrun ends all ranks as soon as one has ended, so the others wait for that."""
    import torch.distributed as dist

    from dynamicemb.cli.console import warn

    if is_first_rank():
        warn("error", str(error))
    if dist.is_initialized():
        # Of the store, not a collective: nobody knows what collectives the other ranks are in.
        store = dist.distributed_c10d._get_default_store()
        with suppress(RuntimeError):  # in vain: rank 0 has nothing to say, or has ended and taken the store with it
            if is_first_rank():
                store.set(_SAID, "")
            else:
                store.wait([_SAID], _PATIENCE)
    return typer.Exit(1)


def _made(name: str) -> nn.Module:
    import torch.distributed as dist
    from torch import nn

    with _one_default_group():
        function = _function(name)
        if not dist.is_initialized():
            _join_ranks()
        model = function()
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{name} returned {type(model).__name__}, not the sharded model", param_hint="--model")
    return model


def _function(name: str) -> Callable[[], Any]:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise typer.BadParameter(f"{name!r} is not PACKAGE.MODULE:FUNCTION", param_hint="--model")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only if it is this module or a package that it is in: what the module imports is not a matter of usage.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        message = f"no module {error.name!r} in {os.getcwd()} or on the path of Python"
        raise typer.BadParameter(message, param_hint="--model") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise typer.BadParameter(f"{module_name} has no function {function_name!r}", param_hint="--model")
    return function


def _join_ranks() -> None:
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def _one_default_group() -> Iterator[None]:
    """While a model is made, ``init_process_group`` keeps a default group that is there.

    The same function may thus serve a training script, in which it makes the group, and this command, which had to make
    it first for functions that rely on one.

    Raises:
        ConfigError: the function asks for a backend that the group does not have.
    """
    import torch.distributed as dist

    make = dist.init_process_group

    def make_once(backend: Optional[str] = None, *args: Any, **kwargs: Any) -> None:
        if not dist.is_initialized():
            make(backend, *args, **kwargs)
            return
        own = dist.get_backend()
        if backend is not None and own not in str(backend):
            raise ConfigError(
                f"the model's function asks for a process group with {backend}, but there is one with {own} already; "
                "make the group where its module is imported, or use the one that is there if dist.is_initialized()"
            )

    dist.init_process_group = make_once
    try:
        yield
    finally:
        dist.init_process_group = make


def chosen_tables(chosen: Optional[list[str]], model: nn.Module) -> Optional[Mapping[str, list[str]]]:
    """``table_names`` of dump and load from ``--tables``; a bare name means that table of every collection.

    An entry that is the name of a table, or COLLECTION=NAME of one, means that table, whatever commas, spaces and signs
    of equality it consists of.

    Raises:
        typer.BadParameter: an entry without names.
        ConfigError: no collection has a table of a bare name.
    """
    if not chosen:
        return None
    from dynamicemb.shard.tables import dynamic_tables

    here = [(table.collection, table.name) for table in dynamic_tables(model)]
    result: dict[str, list[str]] = {}
    for entry in chosen:
        if named := [(owner, own) for owner, own in here if entry in (own, f"{owner}={own}")]:
            for owner, own in named:
                if own not in result.setdefault(owner, []):
                    result[owner].append(own)
            continue
        collection, equals, listed = entry.rpartition("=")
        names = [name.strip() for name in listed.split(",") if name.strip()]
        if not names or (equals and not collection):
            raise typer.BadParameter(f"{entry!r} is not [COLLECTION=]NAME,...", param_hint="--tables")
        for name in names:
            owners = [collection] if equals else [owner for owner, own in here if own == name]
            if not owners:
                known = ", ".join(f"{owner}={own}" for owner, own in here) or "none"
                raise ConfigError(f"--tables: the model has no dynamic table {name!r}; it has {known}")
            for owner in owners:
                if name not in result.setdefault(owner, []):
                    result[owner].append(name)
    return result


def renamed_collections(entries: Optional[list[str]], model: nn.Module) -> dict[str, str]:
    """``collections`` of load from ``--collection``. Paths may have signs of equality in them, so that of the model is
    one that it has.

    Raises:
        typer.BadParameter: an entry is not MODEL=CHECKPOINT, or the model's path occurs twice.
    """
    from dynamicemb.shard.tables import dynamic_collections

    known = [path for path, _ in dynamic_collections(model)]
    result: dict[str, str] = {}
    for entry in entries or []:
        here = next((path for path in known if entry.startswith(f"{path}=")), entry.partition("=")[0])
        there = entry.removeprefix(here).removeprefix("=")
        if not here or not there:
            raise typer.BadParameter(f"{entry!r} is not MODEL=CHECKPOINT", param_hint="--collection")
        if here in result:
            raise typer.BadParameter(f"{here!r} is named twice", param_hint="--collection")
        result[here] = there
    return result
