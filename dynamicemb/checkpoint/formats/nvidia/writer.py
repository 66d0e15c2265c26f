"""Writes a table in NVIDIA's newer layout, for any number of ranks.

Their loader puts a key on the rank ``key mod world_size`` (the key's bits read as unsigned; ``dist_type``
``roundrobin``), and a rank that finds as many files as there are ranks reads its own only, so keys are dealt out by
that rule. Rows are float32 whatever the table's dtype. Scores under LRU become ages: the table's clock minus the score.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.checkpoint.files.schema import Rows, opt
from dynamicemb.checkpoint.formats.exchange import as_float32
from dynamicemb.checkpoint.formats.nvidia.files import OPT_ARGS, shard_path
from dynamicemb.checkpoint.formats.nvidia.opt_args import opt_args_of
from dynamicemb.errors import CheckpointError

__all__ = ["NvidiaTableWriter"]


class NvidiaTableWriter:
    """Writes one table, rows in any order.

    Args:
        folder: of the collection; exists.
        table: name of the table.
        record: of the table.
        world_size: ranks to write for.

    Raises:
        CheckpointError: files cannot be written.
    """

    def __init__(self, folder: Path, table: str, record: TableRecord, world_size: int) -> None:
        self._folder, self._table, self._record, self._world_size = folder, table, record, world_size
        self._states = [opt(name) for name, _ in record.schema.states]
        self._items = ("keys", "values", "scores", *(["opt_values"] if self._states else []))
        for rank in range(world_size):
            for item in self._items:
                self._append(rank, item, np.empty(0, np.uint8))

    def write(self, rows: Rows) -> None:
        """Appends ``rows``, each to the files of its rank.

        Raises:
            CheckpointError: there is no room, or a row was used later than the table's clock says.
        """
        arrays = {
            "keys": rows.keys,
            "values": as_float32(rows.values, self._record.schema.dtype),
            "scores": self._scores(rows.scores),
        }
        if self._states:
            arrays["opt_values"] = np.concatenate([rows.arrays[name] for name in self._states], axis=1)
        ranks = rows.keys.view("<u8") % np.uint64(self._world_size)
        order = np.argsort(ranks, kind="stable")
        present, starts = np.unique(ranks[order], return_index=True)
        for rank, run in zip(present.tolist(), np.split(order, starts[1:])):
            for item, array in arrays.items():
                self._append(rank, item, array[run])

    def _scores(self, scores: np.ndarray) -> np.ndarray:
        if self._record.evict_strategy != "lru":
            return scores
        clock = self._record.clock
        if scores.size and (int(scores.max()) > clock or int(scores.min()) < 0):
            raise CheckpointError(
                f"{self._table}: an LRU score of {int(scores.max())} (least: {int(scores.min())}) lies outside "
                f"0 to the table's clock of {clock}; verify the checkpoint"
            )
        return np.int64(clock) - scores

    def _append(self, rank: int, item: str, array: np.ndarray) -> None:
        # Opened for every run of rows: the number of ranks may be above the limit on open files.
        path = shard_path(self._folder, self._table, item, rank, self._world_size)
        try:
            with open(path, "ab", buffering=0) as file:
                view, done = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
                while done < len(view):
                    done += os.write(file.fileno(), view[done:])
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; make room, or choose another path") from error

    def finish(self) -> None:
        """Writes ``opt_args.json`` and waits until everything is on disk."""
        path = self._folder / f"{self._table}{OPT_ARGS}"
        paths = [
            shard_path(self._folder, self._table, item, rank, self._world_size)
            for rank in range(self._world_size)
            for item in self._items
        ]
        try:
            path.write_text(json.dumps(opt_args_of(self._record), indent=4) + "\n", encoding="utf-8")
            for written in [path, *paths]:
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; make room, or choose another path") from error

    def close(self) -> None:
        """Files are open only while they are written."""
