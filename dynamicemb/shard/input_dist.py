"""Ids to their owners: deduplicate, exchange sizes, exchange keys.

Equal keys of a batch travel once. The distinct keys are sorted by (owner, table, mixed key), so what goes to one rank
is one contiguous range. Where a score counts occurrences, they travel beside the keys, as integers.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.types import Awaitable, NoWait
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.errors import KeyTypeError, RemoteRankError
from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.hashing import owners
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.shard.route import OwnedKeys, Route

__all__ = ["DynamicInputDist"]

# What a rank reports beside its sizes, so that an error on one of them is an error on all.
_OK, _BAD_KEY_TYPE = 0, 1
_REPORTS = {_BAD_KEY_TYPE: "ids that are not 32- or 64-bit integers"}


class DynamicInputDist(BaseSparseFeaturesDist[OwnedKeys]):
    """Sends each distinct id of the dynamic tables to the rank that owns it.

    Args:
        pg: ranks that share the tables; None for a single process without one.
        features_by_table: number of features of each table, in the order of the features.
        send_occurrences: whether any of the tables counts occurrences.
        device: of the ids.
    """

    def __init__(
        self,
        pg: Optional[dist.ProcessGroup],
        features_by_table: list[int],
        send_occurrences: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._pg = pg
        self._world_size = 1 if pg is None else pg.size()
        self._features_by_table = features_by_table
        self._send_occurrences = send_occurrences
        self._table_ids = torch.arange(len(features_by_table), dtype=torch.int32, device=device)
        self._error: Optional[KeyTypeError] = None

    def reject(self, error: KeyTypeError) -> None:
        """The next batch, which comes without ids, stands for one that cannot be sent: it ends in an error on all."""
        self._error = error

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[OwnedKeys]]:
        """Starts the exchange of sizes. Waiting for the result starts the exchange of keys, waiting again ends it.

        Args:
            sparse_features: features of the dynamic tables, in the order of the tables; any lengths, also none at all.
                Ids are int64 or int32.

        Raises:
            KeyTypeError: what :meth:`reject` was given (with several ranks: when the sizes have been exchanged, there
                and as :class:`~dynamicemb.errors.RemoteRankError` on all other ranks).
        """
        error, self._error = self._error, None
        if self._world_size == 1:
            if error is not None:
                raise error
            keys, tables, lengths = self._keys_and_tables(sparse_features)
            return _WithRoute(Route(), NoWait(NoWait(OwnedKeys(keys, tables, None, [lengths]))))
        keys, tables, _ = self._keys_and_tables(sparse_features)
        unique = dedup(keys, tables, len(self._features_by_table), self._world_size)
        assert self._pg is not None
        return SizesAwaitable(self._pg, unique, len(self._features_by_table), self._send_occurrences, error)

    def _keys_and_tables(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        lengths_by_feature = features.length_per_key()
        lengths, first = [], 0
        for num_features in self._features_by_table:
            lengths.append(sum(lengths_by_feature[first : first + num_features]))
            first += num_features
        keys = features.values().long().contiguous()
        lengths_on_device = torch.tensor(lengths, device="cpu").to(keys.device, non_blocking=True)
        tables = torch.repeat_interleave(self._table_ids, lengths_on_device, output_size=keys.numel())
        return keys, tables, lengths


class _WithRoute(Awaitable[Awaitable[OwnedKeys]]):
    def __init__(self, route: Route, keys: Awaitable[Awaitable[OwnedKeys]]) -> None:
        super().__init__()
        self.route = route
        self._keys = keys

    def _wait_impl(self) -> Awaitable[OwnedKeys]:
        return self._keys.wait()


class SizesAwaitable(Awaitable[Awaitable[OwnedKeys]]):
    """The exchange of sizes, under way; see :class:`DynamicInputDist`."""

    def __init__(
        self,
        pg: dist.ProcessGroup,
        unique: UniqueKeys,
        num_tables: int,
        send_occurrences: bool,
        error: Optional[KeyTypeError],
    ) -> None:
        super().__init__()
        self.route = Route(unique=unique)
        self._pg, self._num_tables, self._send_occurrences, self._error = pg, num_tables, send_occurrences, error
        world_size = pg.size()
        # A row for each rank: keys of each table, and this rank's report.
        self._sent = torch.zeros(world_size, num_tables + 1, dtype=torch.int64, device=unique.keys.device)
        valid = torch.arange(unique.keys.numel(), device=unique.keys.device) < unique.count
        cells = owners(unique.keys, world_size) * (num_tables + 1) + unique.tables
        self._sent.view(-1).index_add_(0, torch.where(valid, cells, 0), valid.long())
        self._sent[:, num_tables] = _OK if error is None else _BAD_KEY_TYPE
        self._received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(self._received, self._sent, group=pg, async_op=True)

    def _wait_impl(self) -> Awaitable[OwnedKeys]:
        self._work.wait()
        sent, received = torch.stack([self._sent, self._received]).tolist()
        if self._error is not None:
            raise self._error
        for rank, row in enumerate(received):
            if row[-1] != _OK:
                raise RemoteRankError(f"rank {rank} of the process group has {_REPORTS[row[-1]]}; see its message")
        self.route.send_counts = [sum(row[:-1]) for row in sent]
        self.route.receive_counts = [sum(row[:-1]) for row in received]
        assert self.route.unique is not None
        self.route.unique = self.route.unique.narrowed(sum(self.route.send_counts))
        return KeysAwaitable(self._pg, self.route, [row[:-1] for row in received], self._send_occurrences)


class KeysAwaitable(Awaitable[OwnedKeys]):
    """The exchange of keys, under way; see :class:`DynamicInputDist`."""

    def __init__(self, pg: dist.ProcessGroup, route: Route, runs: list[list[int]], send_occurrences: bool) -> None:
        super().__init__()
        unique = route.unique
        assert unique is not None
        self._runs = runs
        columns = [unique.keys]
        if send_occurrences:
            columns.append(unique.offsets.diff())
        self._sent = torch.stack(columns, dim=1)
        self._received = self._sent.new_empty(sum(route.receive_counts), len(columns))
        self._work = dist.all_to_all_single(
            self._received, self._sent, route.receive_counts, route.send_counts, group=pg, async_op=True
        )

    def _wait_impl(self) -> OwnedKeys:
        self._work.wait()
        device, num_tables = self._received.device, len(self._runs[0])
        lengths = torch.tensor(self._runs, device="cpu").view(-1).to(device, non_blocking=True)
        table_ids = torch.arange(num_tables, dtype=torch.int32, device=device).repeat(len(self._runs))
        columns = self._received.t().contiguous()
        return OwnedKeys(
            keys=columns[0],
            tables=torch.repeat_interleave(table_ids, lengths, output_size=columns.shape[1]),
            occurrences=columns[1] if columns.shape[0] > 1 else None,
            runs=self._runs,
        )
