"""``dynamicemb merge``: a full checkpoint and the deltas after it, as one full checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dynamicemb.cli.arguments import Json, Overwrite, parsed_path

__all__ = ["merge"]


def merge(
    base: Annotated[
        Path,
        typer.Argument(parser=parsed_path, metavar="BASE", help="A full checkpoint, or a delta.", show_default=False),
    ],
    deltas: Annotated[
        list[Path],
        typer.Argument(
            parser=parsed_path, metavar="DELTA", help="The deltas that follow it, in their order.", show_default=False
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(parser=parsed_path, metavar="DST", help="Folder to write.", show_default=False)
    ],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Apply deltas to the full checkpoint that they follow, and write the full checkpoint that results.

    If BASE is a delta itself, the result is one delta. A gap in the chain or a wrong order is an error. DST may be one
    of the others, which is replaced when all is written. Works in bounded memory.

    [bold]Example:[/bold] dynamicemb merge /data/full /data/delta-1 /data/delta-2 /data/merged
    """
    from dynamicemb.checkpoint.merge import merge as run
    from dynamicemb.cli.console import progress
    from dynamicemb.cli.result import show_written

    sources = [base, *deltas]
    started = time.perf_counter()
    with progress("merging") as move:
        run(sources, destination, overwrite=overwrite, progress=move)
    seconds = time.perf_counter() - started
    show_written("merged", destination, seconds, json, sources=[str(source) for source in sources])
