"""How many columns of an NVIDIA dump's files are embedding and how many are optimizer state: all from their sizes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dynamicemb.checkpoint.files.manifest import OptimizerRecord
from dynamicemb.checkpoint.formats.nvidia.files import OPT_ARGS, Shard, TableFiles
from dynamicemb.checkpoint.formats.nvidia.opt_args import EITHER_ADAGRAD, state_widths
from dynamicemb.errors import CheckpointError
from dynamicemb.kernels.layout import OptimizerKind, OptimizerState, optimizer_states

__all__ = [
    "AGAIN",
    "KEY_BYTES",
    "SCORE_BYTES",
    "VALUE_BYTES",
    "Columns",
    "columns_of",
    "resolved",
    "rows_by_shard",
    "states_of",
]

KEY_BYTES = SCORE_BYTES = 8
VALUE_BYTES = 4
AGAIN = "copy the file again, or dump the table again"


def states_of(kind: str, dim: int) -> tuple[OptimizerState, ...]:
    """The states that our tables keep for an optimizer of a manifest."""
    return optimizer_states(OptimizerKind[kind.upper()], dim)


def rows_by_shard(files: TableFiles) -> list[int]:
    """Rows of each rank's files; checked against the sizes of keys and scores.

    Raises:
        CheckpointError: a size is no whole number of keys, or scores are not as many.
    """
    rows = [_rows(shard) for shard in files.shards]
    for shard, count in zip(files.shards, rows):
        if shard.scores is not None and (size := _size(shard.scores)) != count * SCORE_BYTES:
            raise CheckpointError(
                f"{shard.scores}, offset {min(size, count * SCORE_BYTES)}: {size} bytes, but {shard.keys} has "
                f"{count} keys, for which it would be {count * SCORE_BYTES}; {AGAIN}"
            )
    return rows


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {AGAIN}") from error


def _rows(shard: Shard) -> int:
    size = _size(shard.keys)
    if size % KEY_BYTES:
        raise CheckpointError(
            f"{shard.keys}, offset {size - size % KEY_BYTES}: {size} bytes are no whole number of keys of "
            f"{KEY_BYTES}; {AGAIN}"
        )
    return size // KEY_BYTES


def _width(path: Path, rows: int, keys: Path) -> Optional[int]:
    """float32 values for each row of a file; None: it has no rows, as ``keys`` has none."""
    size = _size(path)
    if rows == 0 and size == 0:
        return None
    if rows == 0 or size % (rows * VALUE_BYTES) or size == 0:
        raise CheckpointError(
            f"{path}: {size} bytes are no whole number of float32 values for each of the {rows} keys in {keys}; {AGAIN}"
        )
    return size // (rows * VALUE_BYTES)


def _common_width(paths: list[Path], rows: list[int], keys: list[Path]) -> Optional[int]:
    """The width that all files of a table have; None: none of them has rows."""
    found: Optional[tuple[int, Path]] = None
    for path, count, key_path in zip(paths, rows, keys, strict=True):
        width = _width(path, count, key_path)
        if width is None:
            continue
        if found is not None and found[0] != width:
            raise CheckpointError(f"{path}: {width} values for each row, but {found[1]} has {found[0]}; {AGAIN}")
        found = found or (width, path)
    return None if found is None else found[0]


@dataclass(frozen=True)
class Columns:
    """Where things are in the rows of the files.

    Attributes:
        values: width of the values file.
        dim: columns of it that are the embedding, from the first on.
        states: width of the states file; 0: there is none.
        state: columns of state that are read, from the first after the embedding or of the states file on.
    """

    values: int
    dim: int
    states: int
    state: int


def columns_of(
    files: TableFiles, rows: list[int], dim: Optional[int], optimizer: Optional[OptimizerRecord], required: bool
) -> Columns:
    """How the rows of ``files`` are laid out.

    Args:
        files, rows: the files, and rows by shard.
        dim: columns of the embedding, where they are known.
        optimizer: None: not known. Its kind is one of a manifest's.
        required: optimizer state must be there if the optimizer has any.

    Raises:
        CheckpointError: sizes disagree with each other or with ``dim``, or can be read in several ways.
    """
    if files.older:
        return _older_columns(files, rows, dim, optimizer)
    return _newer_columns(files, rows, dim, optimizer, required)


def resolved(
    optimizer: Optional[OptimizerRecord], files: TableFiles, rows: list[int], dim: Optional[int]
) -> Optional[OptimizerRecord]:
    """``optimizer`` with the one kind that fits the widths, where its kind was either Adagrad; None if it has no state.

    Raises:
        CheckpointError: both fit, or neither does.
    """
    if optimizer is None or optimizer.kind != EITHER_ADAGRAD:
        return optimizer
    width = _value_width(files, rows, dim)
    if files.older:
        state = None if dim is None else width - dim
    else:
        dim = width
        states = [shard.states for shard in files.shards if shard.states is not None]
        state = _common_width(states, rows, [shard.keys for shard in files.shards]) if states else 0
    if state == 0:
        return None
    if state is None:  # of the older layout, dim unknown: an odd width is no two of anything
        kinds = ["rowwise_adagrad"] if width % 2 else []
    else:
        assert dim is not None
        kinds = [kind for kind in ("adagrad", "rowwise_adagrad") if state_widths(kind, state, dim) is not None]
    if len(kinds) != 1:
        raise CheckpointError(
            f"{files.opt_args}: does not name the optimizer, and rows of {width} values do not tell which Adagrad it "
            "was; give dim, or add an opt_type of exact_adagrad or exact_row_wise_adagrad to the file"
        )
    return dataclasses.replace(optimizer, kind=kinds[0])


def _value_width(files: TableFiles, rows: list[int], dim: Optional[int]) -> int:
    shards = files.shards
    keys = [shard.keys for shard in shards]
    width = _common_width([shard.values for shard in shards], rows, keys) or dim
    if width is None:
        raise CheckpointError(f"{shards[0].values}: no rows, so their width cannot be told; give dim")
    return width


def _newer_columns(
    files: TableFiles, rows: list[int], dim: Optional[int], optimizer: Optional[OptimizerRecord], required: bool
) -> Columns:
    shards, width = files.shards, _value_width(files, rows, dim)
    if dim is not None and width != dim:
        raise CheckpointError(f"{shards[0].values}: rows of {width} values, but dim is {dim}; give the right dim")
    states = [shard.states for shard in shards if shard.states is not None]
    if not states:
        if required and optimizer is not None and states_of(optimizer.kind, width):
            raise CheckpointError(
                f"{files.opt_args}: says that optimizer state was dumped, but there is no "
                f"{files.table}_emb_opt_values.*; {AGAIN}"
            )
        return Columns(width, width, 0, 0)
    state_width = _common_width(states, rows, [shard.keys for shard in shards])
    if optimizer is None:
        where = files.opt_args or shards[0].keys.parent / f"{files.table}{OPT_ARGS}"
        raise CheckpointError(f"{where}: does not name the optimizer whose state is in {states[0]}; {AGAIN}")
    if state_width is None:  # no rows: as wide as it would be
        state_width = sum(state.width for state in states_of(optimizer.kind, width))
    state = state_widths(optimizer.kind, state_width, width)
    if state is None:
        raise CheckpointError(
            f"{states[0]}: {state_width} values for each row, which {optimizer.kind} does not have with rows of "
            f"{width}; {AGAIN}"
        )
    return Columns(width, width, state_width, state)


def _older_columns(
    files: TableFiles, rows: list[int], dim: Optional[int], optimizer: Optional[OptimizerRecord]
) -> Columns:
    width, path = _value_width(files, rows, dim), files.shards[0].values
    kind = "sgd" if optimizer is None else optimizer.kind
    if dim is None:
        dim = _older_dim(width, kind, path)
    state = 0 if width == dim else None
    if state is None and width > dim:
        state = state_widths(kind, width - dim, dim)
    if state is None:
        raise CheckpointError(
            f"{path}: rows of {width} values, which are not {dim} and the state of {kind}; give the right dim"
            + ("" if files.opt_args else f", or restore {files.table}{OPT_ARGS}")
        )
    return Columns(width, dim, 0, state)


def _older_dim(width: int, kind: str, path: Path) -> int:
    """The one dim that rows of ``width`` values, state included, can have."""
    parts = {"sgd": 1, "adagrad": 2, "adam": 3}.get(kind)
    if parts is not None:
        if width % parts:
            raise CheckpointError(
                f"{path}: rows of {width} values, which are not {parts} times a dim as {kind} has them; "
                f"if they hold no state, give dim={width}, else {AGAIN}"
            )
        return width // parts
    # Row-wise Adagrad: one column, or, padded in memory to 16 bytes, 4 or 8. Such tables have dims of multiples of
    # 4, so a padded row is one as well, and nothing tells it from a row of 1 more than dim = 4 * n - 1.
    if width < 2 or (width % 4 == 0 and width > 4):
        raise CheckpointError(
            f"{path}: rows of {width} values can be read in several ways with rowwise_adagrad, whose state has "
            "1 column, or 4 or 8 with padding; give dim"
        )
    return width - 1
