"""Reads one table of an NVIDIA dump: sizes checked first, then rows in pieces, in our terms.

**Scores.** Under LRU a newer dump holds ages: the time of the dump minus the time a key was last used, in nanoseconds.
Ours are ``score = greatest age of the table - age``: the oldest key gets 0, the order stays, and the table's clock
becomes the greatest score, so that whatever is trained next counts as more recent. In a dump that dynamicemb wrote, an
age is ``clock - score`` and the clock is known, so scores come back as they were. All other scores are taken as they
are; where there are none, all are 0.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np

from dynamicemb.checkpoint.files.manifest import OptimizerRecord, TableRecord
from dynamicemb.checkpoint.files.reader import PIECE_BYTES
from dynamicemb.checkpoint.files.schema import KEYS, SCORES, VALUES, Rows, TableSchema, opt
from dynamicemb.checkpoint.formats.exchange import NO_HINTS, Hints, as_dtype, foreign_record, read_array, score_bounds
from dynamicemb.checkpoint.formats.nvidia.columns import (
    AGAIN,
    KEY_BYTES,
    SCORE_BYTES,
    VALUE_BYTES,
    columns_of,
    resolved,
    rows_by_shard,
    states_of,
)
from dynamicemb.checkpoint.formats.nvidia.files import Shard, TableFiles, find_tables
from dynamicemb.checkpoint.formats.nvidia.opt_args import OptArgs, read_opt_args
from dynamicemb.errors import CheckpointError, DynamicEmbWarning

__all__ = ["NvidiaSource", "nvidia_sources"]


def nvidia_sources(folder: Path, collection: str, hints: Hints) -> list[NvidiaSource]:
    """All tables of one folder of a dump; see :class:`NvidiaSource`."""
    return [NvidiaSource(files, hints) for files in find_tables(folder, collection)]


class NvidiaSource:
    """One table of an NVIDIA dump, of either layout.

    Args:
        files: what :func:`find_tables` found.
        hints: what the user says; otherwise the dim follows from sizes and optimizer, and rows are float32, or what the
            table had when dynamicemb wrote the dump.

    Raises:
        CheckpointError: sizes disagree, the optimizer is unknown, or ``dim`` cannot be told.
    """

    sorted = False

    def __init__(self, files: TableFiles, hints: Hints = NO_HINTS) -> None:
        self.collection, self.table = files.collection, files.table
        self._files = files
        self._rows = rows_by_shard(files)
        self.rows = sum(self._rows)
        self._args = OptArgs() if files.opt_args is None else read_opt_args(files.opt_args)
        ours = self._args.ours
        dim, dtype = hints.dim, hints.dtype
        if dim is None and ours is not None:
            dim = ours.schema.dim
        optimizer = ours.optimizer if ours is not None else self._args.optimizer
        optimizer = resolved(optimizer, files, self._rows, dim)
        required = ours is not None and ours.optimizer.saved
        self._columns = columns_of(files, self._rows, dim, optimizer, required)
        self.record = self._record(hints, optimizer, dtype or (ours.schema.dtype if ours is not None else "float32"))
        self._ages, self._zero_age = False, 0
        self._read_ages()

    def _record(self, hints: Hints, optimizer: Optional[OptimizerRecord], dtype: str) -> TableRecord:
        columns, args = self._columns, self._args
        states: tuple[tuple[str, int], ...] = ()
        if optimizer is not None:
            found = states_of(optimizer.kind, columns.dim)
            states = tuple((state.name, state.width) for state in found) if columns.state else ()
            optimizer = dataclasses.replace(optimizer, saved=bool(states) or not found)
        schema = TableSchema(columns.dim, dtype, states)
        if args.ours is not None:
            saved = optimizer is not None and optimizer.saved and args.ours.optimizer.saved
            return dataclasses.replace(
                args.ours, schema=schema, optimizer=dataclasses.replace(args.ours.optimizer, saved=saved)
            )
        fields = {} if optimizer is None else {"optimizer": optimizer}
        steps = 0 if optimizer is None else optimizer.steps
        strategy = self._strategy(hints.evict_strategy)
        return foreign_record(schema, evict_strategy=strategy, custom_score=args.step_score, clock=steps, **fields)

    def _strategy(self, hint: Optional[str]) -> str:
        has_scores = self._files.shards[0].scores is not None
        strategy = self._args.evict_strategy or hint
        if strategy is None and has_scores:
            keys = self._files.shards[0].keys
            warnings.warn(
                f"{keys}: nothing says what the scores of table {self.table!r} mean; they are taken as they are, "
                "for eviction by 'customized' scores; give evict_strategy if that is wrong",
                DynamicEmbWarning,
                stacklevel=2,
            )
            return "customized"
        if strategy is not None and strategy != "lru" and not has_scores:
            warnings.warn(
                f"{self._files.opt_args}: {strategy} needs scores, but table {self.table!r} has none; all become 0",
                DynamicEmbWarning,
                stacklevel=2,
            )
        return strategy or "lru"

    def _read_ages(self) -> None:
        """Finds out which age is a score of 0, from all scores, and whether they are ages at all."""
        if self._files.shards[0].scores is None:
            return
        dtype = "<u8" if self._files.older else "<i8"
        self._ages = self.record.evict_strategy == "lru"
        bounds = score_bounds(self._score_pieces(dtype))
        if bounds is None:
            return
        least, greatest = bounds
        if greatest >= 2**63 and not self._ages:
            raise CheckpointError(
                f"{self._files.shards[0].scores}: the score {greatest} is above 2**63 - 1, the greatest there is here; "
                "lower the scores before the dump"
            )
        if not self._ages:
            return
        self._zero_age = greatest if self._args.ours is None else self.record.clock
        if self._zero_age < greatest or self._zero_age - least >= 2**63:
            raise CheckpointError(
                f"{self._files.shards[0].scores}: ages from {least} to {greatest} do not fit the clock of "
                f"{self._zero_age} or 63 bits; {AGAIN}"
            )
        clock = max(self.record.clock, self._zero_age - least)
        self.record = dataclasses.replace(self.record, clock=clock)

    def _score_pieces(self, dtype: str) -> Iterator[np.ndarray]:
        step = PIECE_BYTES // SCORE_BYTES
        for shard, rows in zip(self._files.shards, self._rows):
            for first in range(0, rows, step):
                assert shard.scores is not None
                yield read_array(shard.scores, first * SCORE_BYTES, dtype, (min(step, rows - first),))

    def pieces(self) -> Iterator[Rows]:
        columns = self._columns
        row_bytes = (columns.values + columns.states) * VALUE_BYTES + KEY_BYTES + SCORE_BYTES
        step = max(1, PIECE_BYTES // row_bytes)
        for shard, rows in zip(self._files.shards, self._rows):
            for first in range(0, rows, step):
                yield self._read(shard, first, min(step, rows - first))

    def _read(self, shard: Shard, first: int, rows: int) -> Rows:
        columns, schema = self._columns, self.record.schema
        width = columns.values
        values = read_array(shard.values, first * width * VALUE_BYTES, "<f4", (rows, width))
        arrays = {
            KEYS: read_array(shard.keys, first * KEY_BYTES, "<i8", (rows,)),
            VALUES: as_dtype(values[:, : columns.dim], schema.dtype),
            SCORES: self._scores(shard, first, rows),
        }
        states = values[:, columns.dim :]
        if columns.states:
            assert shard.states is not None
            offset = first * columns.states * VALUE_BYTES
            states = read_array(shard.states, offset, "<f4", (rows, columns.states))
        column = 0
        for name, state_width in schema.states:
            arrays[opt(name)] = states[:, column : column + state_width]
            column += state_width
        return Rows(arrays)

    def _scores(self, shard: Shard, first: int, rows: int) -> np.ndarray:
        if shard.scores is None:
            return np.zeros(rows, "<i8")
        scores = read_array(shard.scores, first * SCORE_BYTES, "<i8", (rows,))
        # Modulo 2**64, which is exact: the result was found to fit.
        return (np.uint64(self._zero_age % 2**64) - scores.view("<u8")).view("<i8") if self._ages else scores

    def places(self, key: int) -> list[str]:
        found = []
        for shard, rows in zip(self._files.shards, self._rows):
            step = PIECE_BYTES // KEY_BYTES
            for first in range(0, rows, step):
                keys = read_array(shard.keys, first * KEY_BYTES, "<i8", (min(step, rows - first),))
                found += [f"{shard.keys}, offset {(first + row) * KEY_BYTES}" for row in np.flatnonzero(keys == key)]
        return found

    def close(self) -> None:
        """Files are open only while they are read."""
