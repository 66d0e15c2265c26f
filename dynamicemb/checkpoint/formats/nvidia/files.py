"""Which files of a folder make up which table, in the two layouts that there are.

* Older (25.05 to 25.08): ``{table}_keys``, ``{table}_values`` with the optimizer state in the same rows,
  ``{table}_scores`` unless least recently used keys were evicted, ``{table}_opt_args.json`` with optimizer state.
* Newer (25.09 on): ``{table}_emb_keys.rank_{r}.world_size_{w}`` and so on for every rank (first versions wrote
  ``{table}_opt_values`` where later ones write ``{table}_emb_opt_values``), and ``{table}_opt_args.json``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from dynamicemb.errors import CheckpointError, DynamicEmbWarning

__all__ = ["Shard", "TableFiles", "find_tables", "looks_like_dump", "shard_path"]

OPT_ARGS = "_opt_args.json"
_RANK_FILE = re.compile(
    r"(?P<table>.+?)_(?P<item>emb_keys|emb_values|emb_scores|emb_opt_values|opt_values|counter_keys|counter_frequencies)"
    r"\.rank_(?P<rank>\d+)\.world_size_(?P<world_size>\d+)",
    re.DOTALL,  # a name may have line breaks in it
)
_COUNTERS = ("counter_keys", "counter_frequencies")
_AGAIN = "copy the dump again in full, or dump it again"


def shard_path(folder: Path, table: str, item: str, rank: int, world_size: int) -> Path:
    """A file of the newer layout; ``item`` is ``keys``, ``values``, ``scores`` or ``opt_values``."""
    return folder / f"{table}_emb_{item}.rank_{rank}.world_size_{world_size}"


@dataclass(frozen=True)
class Shard:
    """What one rank wrote of a table; of the older layout, all of it. Scores and states may not have been dumped."""

    keys: Path
    values: Path
    scores: Optional[Path]
    states: Optional[Path]


@dataclass(frozen=True)
class TableFiles:
    """One table's files.

    Attributes:
        collection, table: its name.
        older: of the older layout, in which optimizer state is part of the values.
        opt_args: optimizer and strategy, as JSON; None: there is no such file.
        shards: by rank.
    """

    collection: str
    table: str
    older: bool
    opt_args: Optional[Path]
    shards: tuple[Shard, ...]


def looks_like_dump(folder: Path) -> bool:
    """Whether ``folder`` holds keys and values of a table, in either layout."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return any(match["item"] == "emb_keys" for name in names if (match := _RANK_FILE.fullmatch(name))) or bool(
        _older_tables(names)
    )


def _older_tables(names: set[str]) -> list[str]:
    tables = (name.removesuffix("_keys") for name in names if name.endswith("_keys") and name != "_keys")
    return sorted(table for table in tables if f"{table}_values" in names)


def find_tables(folder: Path, collection: str) -> list[TableFiles]:
    """The tables in one folder. Warns of files that hold something which a checkpoint of ours has no place for.

    Raises:
        CheckpointError: a rank's file is missing, or there are files of several dumps.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    ranked = {name: match for name in sorted(names) if (match := _RANK_FILE.fullmatch(name))}
    used: set[str] = set()
    tables = []
    for table in sorted({match["table"] for match in ranked.values()}):
        items: dict[str, dict[int, str]] = {}
        world_sizes: dict[int, str] = {}
        for name, match in ranked.items():
            if match["table"] == table:
                items.setdefault(match["item"], {})[int(match["rank"])] = name
                world_sizes[int(match["world_size"])] = name
                used.add(name)
        tables.append(_newer_table(folder, collection, table, items, world_sizes, names))
    for table in _older_tables(names):
        if any(known.table == table for known in tables):
            raise CheckpointError(
                f"{folder / f'{table}_keys'}: table {table!r} is here in the older and in the newer layout; "
                "leave only the files of one dump"
            )
        tables.append(_older_table(folder, collection, table, names))
        used |= {f"{table}_keys", f"{table}_values", f"{table}_scores"}
    used |= {f"{table.table}{OPT_ARGS}" for table in tables}
    _warn_of_others(folder, names - used)
    return tables


def _older_table(folder: Path, collection: str, table: str, names: set[str]) -> TableFiles:
    own_states = sorted(
        name for name in names if re.fullmatch(re.escape(table) + r"_opt_(sum|exp_avg|exp_avg_sq)", name)
    )
    if own_states:
        raise CheckpointError(
            f"{folder / own_states[0]}: a file of dynamicemb's own format, but {folder.parent / 'manifest.json'} is "
            "missing; restore the whole checkpoint from a copy"
        )
    scores = folder / f"{table}_scores" if f"{table}_scores" in names else None
    shard = Shard(folder / f"{table}_keys", folder / f"{table}_values", scores, None)
    return TableFiles(collection, table, True, _opt_args(folder, table, names), (shard,))


def _opt_args(folder: Path, table: str, names: set[str]) -> Optional[Path]:
    return folder / f"{table}{OPT_ARGS}" if f"{table}{OPT_ARGS}" in names else None


def _newer_table(
    folder: Path,
    collection: str,
    table: str,
    items: dict[str, dict[int, str]],
    world_sizes: dict[int, str],
    names: set[str],
) -> TableFiles:
    if len(world_sizes) > 1:
        (first, one), (second, other) = sorted(world_sizes.items())[:2]
        raise CheckpointError(
            f"{folder / one} and {folder / other}: files of dumps from {first} and from {second} ranks; "
            "leave only the files of one dump"
        )
    world_size = next(iter(world_sizes))
    states = "emb_opt_values" if "emb_opt_values" in items else "opt_values"
    for item in ("emb_keys", "emb_values", "emb_scores", states):
        if item in items or item in ("emb_keys", "emb_values"):
            _check_ranks(folder, table, item, items.get(item, {}), world_size)
    _warn_of_counters(folder, table, [item for item in _COUNTERS if item in items])

    def path(item: str, rank: int) -> Optional[Path]:
        return folder / items[item][rank] if item in items else None

    shards = tuple(
        Shard(folder / items["emb_keys"][rank], folder / items["emb_values"][rank], path("emb_scores", rank),
              path(states, rank))
        for rank in range(world_size)
    )  # fmt: skip
    return TableFiles(collection, table, False, _opt_args(folder, table, names), shards)


def _check_ranks(folder: Path, table: str, item: str, by_rank: dict[int, str], world_size: int) -> None:
    if beyond := [name for rank, name in by_rank.items() if rank >= world_size]:
        raise CheckpointError(f"{folder / beyond[0]}: its rank is not below its world size; {_AGAIN}")
    # Counted up to the first gap only: a hostile name may speak of 10**18 ranks.
    missing = next((rank for rank in range(world_size) if rank not in by_rank), None)
    if missing is not None:
        path = folder / f"{table}_{item}.rank_{missing}.world_size_{world_size}"
        raise CheckpointError(f"{path}: no such file, but {len(by_rank)} of {world_size} ranks have one; {_AGAIN}")


def _warn_of_counters(folder: Path, table: str, items: Iterable[str]) -> None:
    if found := ", ".join(f"{table}_{item}.*" for item in items):
        warnings.warn(
            f"{folder}: {found} are left out: they count keys that wait for admission, which these tables do not have",
            DynamicEmbWarning,
            stacklevel=2,
        )


def _warn_of_others(folder: Path, names: set[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{folder}: {', '.join(sorted(names)[:3])}{more} belong to no table and are left out",
            DynamicEmbWarning,
            stacklevel=2,
        )
