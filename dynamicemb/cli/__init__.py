"""The ``dynamicemb`` command: one file for each verb.

Modules that take long to import are imported by the verbs when they run, so that ``--help`` answers at once.

Exit codes: 0 all is well; 1 the checkpoint is damaged, differs or lacks an id, or an operation failed; 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional, TextIO, Union

import typer
import typer.core

from dynamicemb.cli.convert import convert
from dynamicemb.cli.diff import diff
from dynamicemb.cli.dump import dump
from dynamicemb.cli.get import get
from dynamicemb.cli.inspect import inspect
from dynamicemb.cli.launch import record_failure
from dynamicemb.cli.load import load
from dynamicemb.cli.merge import merge
from dynamicemb.cli.model import is_first_rank
from dynamicemb.cli.verify import verify
from dynamicemb.errors import DynamicEmbError, DynamicEmbWarning

__all__ = ["app", "main"]

_FAILED = 1
_INTERRUPTED = 130
#: What every kind of wrong usage derives from; typer does not export it.
_UsageError: Any = typer.BadParameter.__base__
#: torchrun ends other ranks as soon as the first one has ended, which takes seconds on a busy machine.
_PATIENCE_SECONDS = 20.0


class _OnRanks(typer.core.TyperGroup):
    """Wrong usage is wrong on all ranks, and said by the first. torchrun ends the others when that one has ended."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _first_rank_first():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any, **options: Any) -> Any:
        with _first_rank_first():
            return super().invoke(*arguments, **options)


@contextmanager
def _first_rank_first() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if not is_first_rank():
            time.sleep(_PATIENCE_SECONDS)  # in vain: the first rank has nothing to say
        record_failure(f"error: {error}")
        raise


app = typer.Typer(
    name="dynamicemb",
    cls=_OnRanks,
    help="Checkpoints of dynamic embedding tables: look at them, check them, turn them into other formats.",
    epilog="Exit codes: 0 all is well; 1 damaged, different, absent or failed; 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(verb: Callable[..., None]) -> str:
    """The paragraphs of its docstring, each on one line, for the terminal to break."""
    paragraphs = (verb.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


_LOOK, _MAKE, _MODEL = "Look at a checkpoint", "Make another one", "With a model, under torchrun"
for _verb, _panel in (
    (inspect, _LOOK),
    (verify, _LOOK),
    (diff, _LOOK),
    (convert, _MAKE),
    (merge, _MAKE),
    (dump, _MODEL),
    (load, _MODEL),
):
    app.command(rich_help_panel=_panel, no_args_is_help=True, help=_help(_verb))(_verb)
# Keys may be negative: what looks like an option and is none is a key.
_numbers = {"ignore_unknown_options": True}
app.command(rich_help_panel=_LOOK, no_args_is_help=True, help=_help(get), context_settings=_numbers)(get)


def _version(shown: bool) -> None:
    if shown:
        from dynamicemb.version import __version__

        print(f"dynamicemb {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Checkpoints of dynamic embedding tables: look at them, check them, turn them into other formats."""


def main() -> None:
    """Runs the command with the arguments of this process and ends it with the exit code."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="dynamicemb")
    except DynamicEmbError as error:
        _fail(str(error))
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_FAILED)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _show_warning(
    message: Union[Warning, str],
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Optional[TextIO] = None,
    line: Optional[str] = None,
) -> None:
    """Our own warnings on one line and from rank 0 only; those of others as Python shows them."""
    if not issubclass(category, DynamicEmbWarning):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
    elif is_first_rank():
        from dynamicemb.cli.console import warn

        warn("warning", str(message))


def _fail(message: str) -> None:
    from dynamicemb.cli.console import warn

    warn("error", message)
    sys.exit(_FAILED)
