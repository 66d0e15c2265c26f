"""Arguments and options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["CheckpointPath", "Json", "Overwrite"]

CheckpointPath = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a checkpoint.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Also replace something at the destination that is not a checkpoint.")
]
