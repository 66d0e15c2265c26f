"""From rows of the log to what a rank feeds its model: its share of each global batch, on its device."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from rows import CATEGORICAL, RowRange, Rows
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    Attributes:
        dense: float32 [B, 13], logarithms of the counts.
        sparse: ids of the 26 features, at most one in each of the B rows.
        labels: float32 [B].
        global_rows: rows of all ranks' shares together; at least 1, while B may be 0.
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: torch.Tensor
    global_rows: int


@dataclass(frozen=True)
class BatchMaker:
    """Cuts ranges of the log into batches.

    Attributes:
        batch_size: rows of a global batch; the last one of a range may be smaller, and then some ranks may get none.
        rank, world_size: whose share to take.
        device: where to put it.
        static_features: features whose ids are taken modulo ``static_rows``, the size of their tables.
    """

    batch_size: int
    rank: int
    world_size: int
    device: torch.device
    static_features: Collection[str]
    static_rows: int

    def steps(self, rows: RowRange) -> int:
        """Batches that :meth:`batches` yields, the same number on every rank."""
        return -(-len(rows) // self.batch_size)

    def batches(self, rows: RowRange, done: int = 0) -> Iterator[Batch]:
        """The shares of this rank, in the order of the log, without the first ``done`` batches. Reads no other rows
        than these (and their chunks)."""
        for start in range(rows.start + done * self.batch_size, rows.stop, self.batch_size):
            count = min(self.batch_size, rows.stop - start)
            first, last = (start + count * rank // self.world_size for rank in (self.rank, self.rank + 1))
            yield self.batch(rows.source.read(first, last), count)

    def batch(self, share: Rows, global_rows: int) -> Batch:
        """``share`` as model inputs. Counts below 0, of which the log has a few, become 0."""
        ids = share.ids.clone()
        for feature, name in enumerate(CATEGORICAL):
            if name in self.static_features:
                ids[:, feature] %= self.static_rows
        by_feature = share.present.t()
        sparse = KeyedJaggedTensor(
            keys=list(CATEGORICAL),
            values=ids.t()[by_feature],
            lengths=by_feature.flatten().to(torch.int32),
            stride=len(share),
        )
        sparse.sync()  # counts the ids of each feature here, so that nobody has to ask the GPU for it
        return Batch(
            dense=torch.log1p(share.dense.clamp(min=0)).to(self.device),
            sparse=sparse.to(self.device),
            labels=share.labels.to(self.device),
            global_rows=global_rows,
        )
