"""``dynamicemb dump``: the tables of a model to a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dynamicemb.cli.arguments import Json, Overwrite, parsed_path
from dynamicemb.cli.model import ModelName, Optim, RankCount, TableNames

__all__ = ["dump"]


def dump(
    model: ModelName,
    path: Annotated[
        Path, typer.Option("--path", parser=parsed_path, metavar="PATH", help="Folder to write.", show_default=False)
    ],
    tables: TableNames = None,
    optim: Optim = False,
    overwrite: Overwrite = False,
    ranks: RankCount = None,
    json: Json = False,
) -> None:
    """Write the dynamic tables of a model to a checkpoint. With --ranks, or under torchrun, with the
    ranks that the model needs.

    The checkpoint that was at PATH stays whole until the new one takes its place in one step.

    [bold]Example:[/bold] dynamicemb dump --ranks 2 --model train:sharded_model --path /data/ckpt
    """
    from dynamicemb.cli.model import chosen_tables, is_first_rank, on_ranks, sharded_model

    on_ranks(ranks)  # before torch is imported, which reads what it may say only once
    from dynamicemb.checkpoint.dump import DynamicEmbDump
    from dynamicemb.cli.result import dumped_tables, show_tables

    with sharded_model(model) as sharded:
        names = chosen_tables(tables, sharded)
        started = time.perf_counter()
        DynamicEmbDump(path, sharded, names, optim, overwrite=overwrite)
        seconds = time.perf_counter() - started
    if is_first_rank():
        show_tables("dumped to", [path], dumped_tables(path), seconds, json)
