"""What a table's files hold: their names, dtypes and shapes, and rows in memory as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
import torch

from dynamicemb.kernels.hashing import mix64

__all__ = [
    "DTYPES",
    "EVICTED",
    "EVICTED_PART",
    "KEYS",
    "SCORES",
    "VALUES",
    "Part",
    "Rows",
    "TableSchema",
    "mixed_keys",
    "opt",
]

KEYS, VALUES, SCORES, EVICTED = "keys", "values", "scores", "evicted"
_OPT = "opt_"
#: Dtypes of files by name, as NumPy stores them: it has no bfloat16, whose bits are kept.
DTYPES: dict[str, np.dtype[Any]] = {
    "int64": np.dtype("<i8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def opt(state: str) -> str:
    """Name of the part that holds an optimizer state."""
    return _OPT + state


@dataclass(frozen=True)
class Part:
    """One file of a table: ``width`` values of ``dtype`` for each row; width None: one, and the array is flat."""

    name: str
    dtype: str
    width: Optional[int] = None

    @property
    def row_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * (1 if self.width is None else self.width)

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def empty(self, rows: int) -> np.ndarray:
        return np.empty(self.shape(rows), DTYPES[self.dtype])


@dataclass(frozen=True)
class TableSchema:
    """What decides about a table's files.

    Attributes:
        dim: columns of a row's embedding.
        dtype: of the embeddings: float32, float16 or bfloat16.
        states: name and float32 values for each row of every optimizer state that is saved, in order.
    """

    dim: int
    dtype: str
    states: tuple[tuple[str, int], ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order in which they are written. Keys come first."""
        states = tuple(Part(opt(name), "float32", width) for name, width in self.states)
        return (Part(KEYS, "int64"), Part(VALUES, self.dtype, self.dim), Part(SCORES, "int64"), *states)

    @property
    def row_bytes(self) -> int:
        return sum(part.row_bytes for part in self.parts)

    def without_states(self) -> TableSchema:
        return TableSchema(self.dim, self.dtype)

    def empty(self, rows: int) -> Rows:
        """``rows`` rows, undefined."""
        return Rows({part.name: part.empty(rows) for part in self.parts})


#: Of keys that have gone since the checkpoint before; a file of deltas.
EVICTED_PART = Part(EVICTED, "int64")


@dataclass(frozen=True)
class Rows:
    """Rows as they are on disk.

    Attributes:
        arrays: by name of the part; C-contiguous, little-endian, ``[n]`` or ``[n, width]``.
    """

    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.keys.shape[0]

    def __getitem__(self, rows: Union[slice, np.ndarray]) -> Rows:
        return Rows({name: array[rows] for name, array in self.arrays.items()})

    @property
    def keys(self) -> np.ndarray:
        return self.arrays[KEYS]

    @property
    def values(self) -> np.ndarray:
        return self.arrays[VALUES]

    @property
    def scores(self) -> np.ndarray:
        return self.arrays[SCORES]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @staticmethod
    def concatenated(runs: Sequence[Rows]) -> Rows:
        """``runs``, at least one, one after the other."""
        if len(runs) == 1:
            return runs[0]
        return Rows({name: np.concatenate([run.arrays[name] for run in runs]) for name in runs[0].arrays})


def mixed_keys(keys: np.ndarray) -> np.ndarray:
    """The order of a table's files: ``mix64`` of int64 [n] keys, as uint64 [n]."""
    return mix64(torch.from_numpy(np.ascontiguousarray(keys))).numpy().view(np.uint64)
