"""Which keys of a step go where: shared by the input distribution, the lookup and the output distribution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.streamable import Multistreamable

from dynamicemb.kernels.views import UniqueKeys

__all__ = ["DynamicShardingContext", "OwnedKeys", "Route"]


@dataclass
class Route(Multistreamable):
    """How one batch of this rank travels; completed when the sizes have been exchanged.

    Attributes:
        unique: this rank's distinct keys, in the order in which they are sent; None on a single rank, where nothing
            travels.
        send_counts: keys sent to each rank.
        receive_counts: keys received from each rank.
    """

    unique: Optional[UniqueKeys] = None
    send_counts: list[int] = field(default_factory=list)
    receive_counts: list[int] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        if self.unique is not None:
            for tensor in self.unique.tensors():
                _record(tensor, stream)


@dataclass
class OwnedKeys(Multistreamable):
    """The keys that this rank owns, as they arrived: by sender, and by table from each sender.

    torchrec keeps it in the list in which it keeps the ``KeyedJaggedTensor`` of other shardings, and asks it for
    :meth:`lengths`, :meth:`stride` and :meth:`variable_stride_per_key`.

    Attributes:
        keys: int64 [N].
        tables: int32 [N], index of each key's table in the sharding.
        occurrences: int64 [N], how often the sender met the key; None where every entry counts once.
        runs: entries of each table from each sender, ``runs[sender][table]``; they add up to N.
        takes_gradients: whether the ranks exchange gradients of this batch, because a table takes updates on any of
            them; None on a single rank, where nothing is to be agreed on.
    """

    keys: torch.Tensor
    tables: torch.Tensor
    occurrences: Optional[torch.Tensor]
    runs: list[list[int]]
    takes_gradients: Optional[bool] = None

    def lengths(self) -> torch.Tensor:
        """None at all: torchrec notes them for its own output distributions, which have no part in this."""
        return self.keys.new_empty(0)

    def stride(self) -> int:
        return 1

    def variable_stride_per_key(self) -> bool:
        return False

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.keys, self.tables, self.occurrences):
            if tensor is not None:
                _record(tensor, stream)


class DynamicShardingContext(SequenceShardingContext):
    """torchrec's context of a sequence sharding, with the route of the batch.

    Args:
        route: of the batch.
        fields: torchrec's.
    """

    # No dataclass, because torchrec's own is none before 1.7.
    def __init__(self, route: Optional[Route] = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.route = route

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        if self.route is not None:
            self.route.record_stream(stream)


def _record(tensor: torch.Tensor, stream: torch.Stream) -> None:
    if tensor.is_cuda:
        tensor.record_stream(stream)
