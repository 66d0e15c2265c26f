"""An all-to-all of rows that can be waited for later, with gradients going the other way.

torchrec's own sequence transfer also permutes rows between features, which costs a copy each way that is not needed
here. Its conventions are kept: quantised communication by its codecs, and gradients divided by the number of ranks
unless ``torchrec.distributed.comm_ops.set_gradient_division(False)``.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.types import Awaitable, QuantizedCommCodec, QuantizedCommCodecs

from dynamicemb.table.eager import eager

__all__ = ["RowTransfer"]


class _Exchange:
    """One all-to-all under way: rows are encoded before it starts and decoded when it has ended."""

    def __init__(
        self,
        rows: torch.Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        pg: dist.ProcessGroup,
        codec: Optional[QuantizedCommCodec[Any]],
    ) -> None:
        self._dim, self._codec = rows.shape[1], codec
        sizes = [[count * self._dim for count in counts] for counts in (send_counts, receive_counts)]
        self._sent = rows.contiguous().view(-1)
        if codec is not None:
            self._context = codec.create_context()
            self._sent = codec.encode(self._sent, self._context)
            sizes = [[codec.calc_quantized_size(size, self._context) for size in side] for side in sizes]
        self._received = self._sent.new_empty(sum(sizes[1]))
        self._work = dist.all_to_all_single(self._received, self._sent, sizes[1], sizes[0], group=pg, async_op=True)

    def wait(self) -> torch.Tensor:
        self._work.wait()
        received = self._received if self._codec is None else self._codec.decode(self._received, self._context)
        return received.view(-1, self._dim)


class _Directions:
    """The exchange of rows, and later that of their gradients. Part of the graph, so it keeps no tensors but those that
    are under way."""

    def __init__(
        self,
        send_counts: list[int],
        receive_counts: list[int],
        pg: dist.ProcessGroup,
        codecs: Optional[QuantizedCommCodecs],
    ) -> None:
        self._send_counts, self._receive_counts, self._pg = send_counts, receive_counts, pg
        self._codecs = (None, None) if codecs is None else (codecs.forward, codecs.backward)
        self._under_way: Optional[_Exchange] = None

    def start(self, rows: torch.Tensor) -> None:
        self._under_way = _Exchange(rows, self._send_counts, self._receive_counts, self._pg, self._codecs[0])

    def start_backward(self, gradients: torch.Tensor) -> None:
        self._under_way = _Exchange(gradients, self._receive_counts, self._send_counts, self._pg, self._codecs[1])

    def finish(self) -> torch.Tensor:
        assert self._under_way is not None, "nothing is under way"
        exchange, self._under_way = self._under_way, None
        return exchange.wait()

    def finish_backward(self) -> torch.Tensor:
        gradients = self.finish()
        if get_gradient_division():
            gradients = gradients.div_(self._pg.size())
        return gradients  # in the dtype of the codec, if there is one; autograd converts it to that of the rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, directions: _Directions) -> torch.Tensor:
        ctx.directions = directions
        directions.start(rows)
        return rows.new_empty(0)

    @staticmethod
    @eager
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.directions.finish_backward(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, directions: _Directions) -> torch.Tensor:
        ctx.directions = directions
        return directions.finish()

    @staticmethod
    @eager
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.directions.start_backward(gradients)
        return gradients.new_empty(0), None


class RowTransfer(Awaitable[torch.Tensor]):
    """Rows to the ranks that asked for them; starts when it is made.

    Args:
        rows: float [sum(send_counts), dim], grouped by receiver.
        send_counts: rows for each rank.
        receive_counts: rows from each rank.
        pg: the ranks.
        codecs: torchrec's codecs for both directions; None: rows travel as they are.

    Waiting returns [sum(receive_counts), dim], grouped by sender.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        pg: dist.ProcessGroup,
        codecs: Optional[QuantizedCommCodecs],
    ) -> None:
        super().__init__()
        # The graph must not lead back to this object, which has the token: that would wait for the garbage collector.
        self._directions = _Directions(send_counts, receive_counts, pg, codecs)
        self._token = _Start.apply(rows, self._directions)

    def _wait_impl(self) -> torch.Tensor:
        return _Finish.apply(self._token, self._directions)
