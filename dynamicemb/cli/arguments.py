"""Arguments and options that several verbs have."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from dynamicemb.errors import ConfigError

__all__ = ["CheckpointPath", "Json", "Overwrite", "TableChoice", "chosen_tables", "parsed_path"]


def parsed_path(text: str) -> Path:
    """What a path on the command line means.

    Raises:
        typer.BadParameter: it is none, or a URL.
    """
    from dynamicemb.checkpoint.files.paths import local_path

    try:
        return local_path(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


CheckpointPath = Annotated[
    Path, typer.Argument(parser=parsed_path, metavar="PATH", help="Folder of a checkpoint.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Also replace something at the destination that is not a checkpoint.")
]
TableChoice = Annotated[
    Optional[list[str]],
    typer.Option(
        "--table",
        metavar="NAME",
        show_default=False,
        help="All of this table: NAME, COLLECTION/NAME or a pattern such as 'c*'; may be repeated.",
    ),
]


def chosen_tables(
    tables: Iterable[tuple[str, str]], names: Optional[Sequence[str]], where: str
) -> list[tuple[str, str]]:
    """Which of ``tables``, (collection, name), ``--table`` names, each once, in its order; without it, all of them.

    A name that a table has means that table, whatever characters it consists of; another is a pattern.

    Raises:
        CheckpointError: a name that no table of ``where`` has or several have, or a pattern that none matches.
    """
    from dynamicemb.checkpoint.files.reader import named

    every = list(tables)
    if not names:
        return every
    chosen: dict[tuple[str, str], None] = {}
    for name in names:
        both = {table: (table[1], "/".join(table)) for table in every}
        matching = [table for table in every if any(fnmatch.fnmatchcase(one, name) for one in both[table])]
        if any(name in own for own in both.values()) or not matching:
            matching = [named(every, name, where)]
        chosen |= dict.fromkeys(matching)
    return list(chosen)
