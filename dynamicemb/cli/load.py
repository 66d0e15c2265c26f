"""``dynamicemb load``: a checkpoint into a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dynamicemb.cli.arguments import Json, parsed_path
from dynamicemb.cli.model import CollectionNames, ModelName, Optim, RankCount, TableNames

__all__ = ["load"]


def load(
    model: ModelName,
    paths: Annotated[
        list[Path],
        typer.Option(
            "--path",
            parser=parsed_path,
            metavar="PATH",
            show_default=False,
            help="Checkpoint to read; repeated, in their order, for a full one and the deltas that follow it.",
        ),
    ],
    tables: TableNames = None,
    optim: Optim = False,
    collections: CollectionNames = None,
    ranks: RankCount = None,
    json: Json = False,
) -> None:
    """Load a checkpoint into the dynamic tables of a model: whether it fits, and how long it takes.

    Every byte is checked, and every rank gets the rows that it owns. The model ends with the command: a training job
    calls DynamicEmbLoad itself.

    [bold]Example:[/bold] dynamicemb load --ranks 2 --model train:sharded_model --path /data/ckpt
    """
    from dynamicemb.cli.model import chosen_tables, is_first_rank, on_ranks, renamed_collections, sharded_model

    on_ranks(ranks)  # before torch is imported, which reads what it may say only once
    from dynamicemb.checkpoint.load import DynamicEmbLoad
    from dynamicemb.cli.result import loaded_tables, show_tables

    with sharded_model(model) as sharded:
        names, renamed = chosen_tables(tables, sharded), renamed_collections(collections, sharded)
        started = time.perf_counter()
        DynamicEmbLoad(paths, sharded, names, optim, collections=renamed)
        seconds = time.perf_counter() - started
        loaded = loaded_tables(sharded, names, paths[-1], renamed)
    if is_first_rank():
        show_tables("loaded", paths, loaded, seconds, json)
