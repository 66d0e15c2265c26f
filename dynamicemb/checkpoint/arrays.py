"""Between the tensors of a table and the arrays of files: the same bytes, named as the format names them."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from dynamicemb.checkpoint.files.schema import Rows, TableSchema, opt
from dynamicemb.table.contents import SlotRun, TableContents
from dynamicemb.table.filling import HostRows

__all__ = ["RowBuffers", "from_disk"]


class RowBuffers:
    """Memory for rows on their way to the files, used in turn: fresh memory for each piece costs more than the copy.

    Args:
        schema: what the rows hold.
        rows: of a piece, at most.
        pieces: that are on their way at a time.
    """

    def __init__(self, schema: TableSchema, rows: int, pieces: int) -> None:
        self._schema = schema
        self._buffers = itertools.cycle([schema.empty(rows) for _ in range(pieces)])

    def fill(self, contents: TableContents, run: SlotRun) -> Rows:
        """The rows of ``run`` as they are written. Valid until ``pieces`` more have been filled."""
        rows = next(self._buffers)[: len(run)]
        tensors = from_disk(rows, self._schema, optim=True)
        tensors.keys.copy_(run.keys)
        tensors.scores.copy_(run.scores)
        contents.read_into(run, tensors.embeddings, tensors.states)
        return rows


def from_disk(rows: Rows, schema: TableSchema, optim: bool) -> HostRows:
    """Rows that were read, as tensors over the same memory.

    Args:
        rows: of a table with this schema.
        schema: what they hold.
        optim: take the optimizer state, too.
    """
    values = torch.from_numpy(rows.values.view(np.int16) if schema.dtype == "bfloat16" else rows.values)
    return HostRows(
        keys=torch.from_numpy(rows.keys),
        scores=torch.from_numpy(rows.scores),
        embeddings=values.view(torch.bfloat16) if schema.dtype == "bfloat16" else values,
        states={name: torch.from_numpy(rows.arrays[opt(name)]) for name, _ in schema.states} if optim else {},
    )
