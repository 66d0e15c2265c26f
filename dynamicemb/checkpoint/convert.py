"""Conversion of checkpoints between our format and those of others, whatever the direction, in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.manifest import MANIFEST
from dynamicemb.checkpoint.files.paths import PathLike, local_path
from dynamicemb.checkpoint.files.reader import Checkpoint, Piece
from dynamicemb.checkpoint.files.staging import Staging, finished
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from dynamicemb.checkpoint.formats.exchange import NO_HINTS, Hints, NativeSource, Source, StrippedSource
from dynamicemb.checkpoint.formats.export import EXPORTS, export_table, file_source, prepare
from dynamicemb.checkpoint.formats.nvidia import looks_like_dump, nvidia_sources
from dynamicemb.checkpoint.formats.sorting import ordered
from dynamicemb.errors import CheckpointError, ConfigError
from dynamicemb.names import unstorable

__all__ = ["FORMATS", "convert", "detect"]

FORMATS = ("native", "nvidia", *EXPORTS)
Progress = Callable[[str, int, int], None]


def convert(
    src: PathLike,
    dst: PathLike,
    to: str,
    world_size: Optional[int] = None,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
    *,
    dim: Optional[int] = None,
    dtype: Optional[str] = None,
    evict_strategy: Optional[str] = None,
    optim: bool = True,
) -> None:
    """Writes the tables of ``src`` to ``dst`` in the format ``to``. ``dst`` appears when all of it is on disk.

    Args:
        src: a checkpoint of ours, a dump of NVIDIA's dynamicemb (either layout), or Parquet or safetensors files with
            ids and rows: the folder that holds the collections, the folder of one collection, or one file.
        dst: where to; its folder is made if needed.
        to: ``native``, ``nvidia`` (the newer layout), ``parquet`` or ``safetensors``.
        world_size: ranks of an NVIDIA dump (default: 1).
        overwrite: replace what is at ``dst``. Without it, only a checkpoint is replaced, and only by another one.
        progress: called with ``<collection>/<table>``, rows done and all rows of the table, at least at the beginning
            and at the end of each table. A row is done half when it is read and half when it is written.
        dim: columns of the embeddings in an NVIDIA dump, where its sizes do not tell.
        dtype: of the rows of a table from elsewhere: float32, float16 or bfloat16, rounded to the nearest. None: that
            of the file, or the one the table had when dynamicemb wrote the file.
        evict_strategy: ``lru``, ``lfu`` or ``customized``: what scores mean in files from elsewhere that do not say so.
        optim: take the optimizer state along.

    Raises:
        ConfigError: an argument that cannot be honoured, or a library that is missing.
        CheckpointError: ``src`` is damaged, incomplete or unknown, a key occurs twice, or ``dst`` cannot be written.
            Whatever was at ``dst`` is still there then.
    """
    _check_arguments(to, world_size)
    hints = Hints(dim, dtype, evict_strategy)
    source_path, target = (Path(os.path.abspath(local_path(path, name))) for path, name in ((src, "src"), (dst, "dst")))
    if target in source_path.parents or source_path in target.parents:
        raise CheckpointError(f"{target} and {source_path} lie one inside the other; choose another path")
    with contextlib.ExitStack() as stack:
        sources = _open(source_path, hints, stack)
        if not optim:
            sources = [StrippedSource(source) for source in sources]
        scratch = target.with_name(target.name + ".sorting")
        if to == "native":
            _write_native(sources, target, scratch, overwrite, progress)
        else:
            _write_others(sources, target, scratch, overwrite, progress, to, world_size or 1)


def _check_arguments(to: str, world_size: Optional[int]) -> None:
    if to not in FORMATS:
        raise ConfigError(f"to={to!r} is not a format; use one of {', '.join(FORMATS)}")
    if world_size is not None and (to != "nvidia" or world_size < 1):
        raise ConfigError(f"world_size={world_size} with to={to!r}: it is 1 or more, and goes with nvidia only")
    prepare(to)


def detect(path: PathLike) -> str:
    """Which of :data:`FORMATS` is at ``path``.

    Raises:
        CheckpointError: none, or several.
    """
    path = local_path(path)
    if os.path.exists(finished(path) / MANIFEST):
        return "native"
    if os.path.isfile(path) and path.suffix.removeprefix(".") in EXPORTS:
        return path.suffix.removeprefix(".")
    if not os.path.isdir(path):
        what = "not a Parquet or safetensors file, nor a folder" if os.path.exists(path) else "no such file or folder"
        raise CheckpointError(f"{path}: {what}; give the path of a checkpoint")
    if path.name.endswith(".unfinished"):
        raise CheckpointError(f"{path}: a dump that was never finished; use the checkpoint beside it, or dump again")
    found = {kind for folder in _folders(path) for kind in _kinds(folder)}
    if len(found) != 1:
        here = f"it holds {' and '.join(sorted(found))}" if found else f"no {MANIFEST}, and no files of another format"
        raise CheckpointError(
            f"{path}: not one checkpoint: {here}; give the folder that holds the collections' folders, or one file"
        )
    return found.pop()


def _folders(path: Path) -> list[Path]:
    """Where tables can lie: in the folder itself, as in that of a collection, or in those inside."""
    return [path, *sorted(folder for folder in path.iterdir() if folder.is_dir())]


def _kinds(folder: Path) -> set[str]:
    kinds = {path.suffix.removeprefix(".") for path in folder.iterdir() if path.is_file()} & set(EXPORTS)
    return kinds | ({"nvidia"} if looks_like_dump(folder) else set())


def _open(path: Path, hints: Hints, stack: contextlib.ExitStack) -> list[Source]:
    """All tables at ``path``, opened and checked; ``stack`` closes them."""
    kind = detect(path)
    if kind == "native":
        return _open_native(path, hints, stack)
    sources: list[Source] = []
    files = [path] if path.is_file() else []
    for folder in _folders(path) if path.is_dir() else []:
        if kind == "nvidia" and looks_like_dump(folder):
            sources += nvidia_sources(folder, folder.name, hints)
        files += sorted(file for file in folder.iterdir() if file.is_file() and file.suffix == f".{kind}")
    for file in files:
        source = file_source(file, file.parent.name, hints)
        stack.callback(source.close)
        sources.append(source)
    _check_names(path, sources)
    return sources


def _open_native(path: Path, hints: Hints, stack: contextlib.ExitStack) -> list[Source]:
    checkpoint = stack.enter_context(Checkpoint(path))
    if checkpoint.manifest.kind != "full":
        raise CheckpointError(
            f"{path}: a delta, which is not a whole table; merge it first: dynamicemb merge BASE {path.name} DST"
        )
    if hints != NO_HINTS:
        raise ConfigError(f"{path} says itself what dim, dtype and evict_strategy its tables have; leave them out")
    return [NativeSource(stored) for stored in checkpoint.tables.values()]


def _check_names(path: Path, sources: list[Source]) -> None:
    """Names become parts of paths; what could lead elsewhere, or meets another, is refused."""
    seen = set()
    for source in sources:
        name = f"{source.collection}/{source.table}"
        reason = (
            unstorable(source.collection) or unstorable(source.table) or ("it occurs twice" if name in seen else None)
        )
        if reason:
            raise CheckpointError(f"{path}: {name!r} cannot be a table's name: {reason}; rename the file or the folder")
        seen.add(name)


def _pieces(
    source: Source, scratch: Path, progress: Optional[Progress]
) -> tuple[Iterator[Piece], Callable[[int], None]]:
    """The rows of ``source`` in order, and what to call with the number of rows that have been written."""
    halves = 0

    def advance(rows: int) -> None:
        nonlocal halves
        halves += rows
        if progress is not None:
            progress(f"{source.collection}/{source.table}", halves // 2, source.rows)

    advance(0)
    return ordered(source, scratch, advance), advance


def _write_native(
    sources: list[Source], target: Path, scratch: Path, overwrite: bool, progress: Optional[Progress]
) -> None:
    with CheckpointWriter(target, overwrite=overwrite) as checkpoint:
        for source in sources:
            record, keys_sum = source.record, 0
            writer = checkpoint.table(source.collection, source.table, record.schema)
            pieces, written = _pieces(source, scratch, progress)
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    writer.write(piece.rows)
                    keys_sum += int(piece.mixed.sum(dtype=np.uint64))
                    written(len(piece.rows))
            writer.finish(dataclasses.replace(record, table_rows=writer.rows, keys_sum=keys_sum % 2**64))


def _write_others(
    sources: list[Source],
    target: Path,
    scratch: Path,
    overwrite: bool,
    progress: Optional[Progress],
    to: str,
    world_size: int,
) -> None:
    if not overwrite and os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            f"{target}: there is something already; choose another path, or overwrite=True (--overwrite) to replace it"
        )
    staging = Staging(target)
    staging.begin(overwrite)
    try:
        for source in sources:
            pieces, written = _pieces(source, scratch, progress)
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for rows in export_table(staging.folder, source, pieces, to, world_size):
                    written(rows)
        staging.commit()
    except BaseException:
        staging.abandon()
        raise
