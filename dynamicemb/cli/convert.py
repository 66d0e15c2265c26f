"""``dynamicemb convert``: a checkpoint in another format."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from dynamicemb.cli.arguments import Json, Overwrite, parsed_path

__all__ = ["DType", "Format", "Strategy", "convert"]


class Format(enum.StrEnum):
    """What can be written."""

    NATIVE = "native"
    NVIDIA = "nvidia"
    PARQUET = "parquet"
    SAFETENSORS = "safetensors"


class DType(enum.StrEnum):
    """What a row can consist of."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Strategy(enum.StrEnum):
    """What a score can be."""

    LRU = "lru"
    LFU = "lfu"
    CUSTOMIZED = "customized"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            parser=parsed_path,
            metavar="SRC",
            help="A checkpoint, a dump of NVIDIA dynamicemb, Parquet or safetensors.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(parser=parsed_path, metavar="DST", help="Folder to write.", show_default=False)
    ],
    to: Annotated[Format, typer.Option("--to", help="What to write.", show_default=False)],
    world_size: Annotated[
        Optional[int],
        typer.Option(min=1, metavar="N", help="Ranks to write files for (nvidia only; default 1).", show_default=False),
    ] = None,
    optim: Annotated[bool, typer.Option("--optim/--no-optim", help="Take the optimizer's state along.")] = True,
    dim: Annotated[
        Optional[int],
        typer.Option(min=1, help="Columns of a dump from NVIDIA, where its sizes do not tell.", show_default=False),
    ] = None,
    dtype: Annotated[
        Optional[DType],
        typer.Option(help="Of the rows of a file from elsewhere. Default: its own.", show_default=False),
    ] = None,
    evict_strategy: Annotated[
        Optional[Strategy],
        typer.Option(help="What scores mean in a file from elsewhere that does not say so.", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in another format, or make a checkpoint from one.

    What SRC is shows in its files. Nothing appears at DST before all of it is written. Works in bounded memory.

    [bold]Example:[/bold] dynamicemb convert /data/checkpoint /data/for-serving --to parquet
    """
    if world_size is not None and to is not Format.NVIDIA:
        raise typer.BadParameter(f"--to {to} has no files for each rank; leave it out", param_hint="--world-size")
    from dynamicemb.checkpoint.convert import convert as run
    from dynamicemb.cli.console import progress
    from dynamicemb.cli.result import show_written

    started = time.perf_counter()
    with progress("converting") as move:
        run(
            source,
            destination,
            to.value,
            world_size=world_size,
            overwrite=overwrite,
            progress=move,
            dim=dim,
            dtype=dtype,
            evict_strategy=evict_strategy,
            optim=optim,
        )
    show_written("converted", destination, time.perf_counter() - started, json, source=str(source), to=to.value)
