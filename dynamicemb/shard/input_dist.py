"""Ids to their owners: deduplicate, exchange sizes, exchange keys.

Equal keys of a batch travel once. The distinct keys are sorted by (owner, table, mixed key), so what goes to one rank
is one contiguous range. Where a score counts occurrences, they travel beside the keys, as integers.

What arrives is deduplicated at once for a lookup that trains, also on a single rank, where nothing travels: a pipeline
distributes a batch while it computes on the one before, which hides it.

The host learns nothing of a batch but its sizes: on one rank from torchrec, which has them to cut the batch into
features; on several ranks, where a collective takes them as numbers, by one copy from the device for each batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Optional

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.types import Awaitable, NoWait
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb.errors import DynamicEmbError, KeyTypeError, RemoteRankError
from dynamicemb.kernels.outgoing import count_runs, with_occurrences
from dynamicemb.kernels.repeat import repeat
from dynamicemb.kernels.views import UniqueKeys
from dynamicemb.shard.route import GroupKeys, OwnedKeys, Route, keys_by_group
from dynamicemb.table.storage import state_memory

__all__ = ["DynamicInputDist"]

# What a rank that cannot send its ids reports in place of its sizes, so that an error on one rank is an error on all.
_MALFORMED, _BAD_KEY_TYPE = -2, -1
_REPORTS = {_BAD_KEY_TYPE: "ids that are not 32- or 64-bit integers", _MALFORMED: "a malformed batch"}
# Added to the size of the first table by a rank on which no table takes updates, so that all ranks know whether any of
# them will want gradients of this batch.
_FROZEN = 1 << 40


class DynamicInputDist(BaseSparseFeaturesDist[OwnedKeys]):
    """Sends each distinct id of the dynamic tables to the rank that owns it.

    Args:
        pg: ranks that share the tables; None for a single process without one.
        features_by_group: number of features of each table of each group, in the order of the features.
        send_occurrences: whether any of the tables counts occurrences.
        device: of the ids.
        takes_gradients: tells whether any of the tables takes updates on this rank.
        trains: tells whether lookups train. One that finds it otherwise by its own time is as right, but later.
    """

    @state_memory()
    def __init__(
        self,
        pg: Optional[dist.ProcessGroup],
        features_by_group: list[list[int]],
        send_occurrences: bool,
        device: torch.device,
        takes_gradients: Callable[[], bool] = lambda: True,
        trains: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__()
        self._pg = pg
        self._world_size = 1 if pg is None else pg.size()
        self._features_by_table = [features for group in features_by_group for features in group]
        self._tables_by_group = [len(group) for group in features_by_group]
        self._send_occurrences = send_occurrences
        self._takes_gradients, self._trains = takes_gradients, trains
        # Made once: a tensor from numbers of the host is a copy to the device, and may wait for it. On a single rank
        # keys are not sorted across groups, and their tables are numbered in the groups from the start.
        numbers = list(range(len(self._features_by_table)))
        if self._world_size == 1:
            numbers = [number for tables in self._tables_by_group for number in range(tables)]
        table_of_feature = [
            table for table, features in zip(numbers, self._features_by_table, strict=True) for _ in range(features)
        ]
        self._table_of_feature = torch.tensor(table_of_feature, dtype=torch.int32, device=device)
        # Keys that arrive come in runs, one for each (rank, table), in this order.
        in_group = [number for tables in self._tables_by_group for number in range(tables)]
        self._table_of_run = torch.tensor(in_group * self._world_size, dtype=torch.int32, device=device)
        self._error: Optional[DynamicEmbError] = None

    def reject(self, error: DynamicEmbError) -> None:
        """The next batch, which comes without ids, stands for one that cannot be sent: it ends in an error on all."""
        self._error = error

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[OwnedKeys]]:
        """Starts the exchange of sizes. Waiting for the result starts the exchange of keys, waiting again ends it.

        Synchronises only with several ranks, and there only once: the wait for the result copies sizes to the host.

        Args:
            sparse_features: features of the dynamic tables, in the order of the tables; any lengths, also none at all.
                Ids are int64 or int32.

        Raises:
            DynamicEmbError: what :meth:`reject` was given (with several ranks: when the sizes have been exchanged,
                there and as :class:`~dynamicemb.errors.RemoteRankError` on all other ranks).
        """
        error, self._error = self._error, None
        if self._world_size == 1:
            if error is not None:
                raise error
            return _WithRoute(Route(), NoWait(NoWait(OwnedKeys(self._owned(self._keys_of(sparse_features))))))
        keys = self._keys_of(sparse_features).deduplicated(self._world_size)
        assert self._pg is not None and keys.unique is not None
        return SizesAwaitable(
            self._pg, keys.unique, self._table_of_run, self._send_occurrences, error, self._takes_gradients(),
            self._owned,
        )  # fmt: skip

    def _keys_of(self, features: KeyedJaggedTensor) -> GroupKeys:
        """This rank's ids of all groups."""
        keys = features.values().long().contiguous()
        lengths = features.lengths().view(len(self._table_of_feature), -1).sum(dim=1)
        tables = repeat(self._table_of_feature, lengths, keys.numel())
        return GroupKeys(keys, tables, None, [self._lengths_by_table(features)])

    def _owned(self, keys: GroupKeys) -> list[GroupKeys]:
        """Keys of all groups that have arrived, by group."""
        groups = keys_by_group(keys, self._tables_by_group)
        return [group.deduplicated(self._world_size) for group in groups] if self._trains() else groups

    def _lengths_by_table(self, features: KeyedJaggedTensor) -> list[int]:
        # Known to the host by now: torchrec has asked for the same numbers to cut the batch into shardings.
        lengths = iter(features.length_per_key())
        return [sum(itertools.islice(lengths, num_features)) for num_features in self._features_by_table]


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
        table_of_run: torch.Tensor,
        send_occurrences: bool,
        error: Optional[DynamicEmbError],
        takes_gradients: bool,
        by_group: Callable[[GroupKeys], list[GroupKeys]],
    ) -> None:
        super().__init__()
        self.route = Route(unique=unique)
        self._pg, self._table_of_run, self._send_occurrences, self._error = pg, table_of_run, send_occurrences, error
        self._by_group = by_group
        # What is sent and what is received, side by side so that they come to the host together.
        runs = table_of_run.view(pg.size(), -1)
        self._sizes = torch.empty(2, *runs.shape, dtype=torch.int64, device=unique.keys.device)
        count_runs(unique, out=self._sizes[0])
        if not takes_gradients:
            self._sizes[0, :, 0] += _FROZEN
        if error is not None:
            self._sizes[0].fill_(_BAD_KEY_TYPE if isinstance(error, KeyTypeError) else _MALFORMED)
        self._work = dist.all_to_all_single(self._sizes[1], self._sizes[0], group=pg, async_op=True)

    def _wait_impl(self) -> Awaitable[OwnedKeys]:
        self._work.wait()
        sent, received = _on_host(self._sizes)
        if self._error is not None:
            raise self._error
        for rank, row in enumerate(received):
            if row[0] < 0:
                raise RemoteRankError(f"rank {rank} of the process group has {_REPORTS[row[0]]}; see its message")
        takes_gradients = self._without_marks(sent, received)
        self.route.send_counts = [sum(row) for row in sent]
        self.route.receive_counts = [sum(row) for row in received]
        assert self.route.unique is not None
        self.route.unique = self.route.unique.narrowed(sum(self.route.send_counts))
        lengths = self._sizes[1].view(-1)
        return KeysAwaitable(
            self._pg, self.route, self._table_of_run, lengths, received, self._send_occurrences, takes_gradients,
            self._by_group,
        )  # fmt: skip

    def _without_marks(self, sent: list[list[int]], received: list[list[int]]) -> bool:
        """Takes the marks of frozen ranks off all sizes. Returns whether any rank has a table that takes updates."""
        takes_gradients = False
        for direction, rows in enumerate((sent, received)):
            for rank, row in enumerate(rows):
                if row[0] >= _FROZEN:
                    row[0] -= _FROZEN
                    self._sizes[direction, rank, 0].sub_(_FROZEN)
                else:
                    takes_gradients = True
        return takes_gradients


def _on_host(sizes: torch.Tensor) -> list[list[list[int]]]:
    """The only wait for the device in a step: the exchange of keys and of rows takes the sizes as numbers."""
    return sizes.tolist()


class KeysAwaitable(Awaitable[OwnedKeys]):
    """The exchange of keys, under way; see :class:`DynamicInputDist`.

    Args:
        pg: the ranks.
        route: of the batch, complete.
        table_of_run: int32 [R], index in its group of the table of each run that arrives.
        lengths: int64 [R], keys of each run that arrives.
        lengths_by_table: the same by sender and table, on the host.
        send_occurrences: whether the keys' occurrences travel beside them.
        takes_gradients: see :class:`~dynamicemb.shard.route.OwnedKeys`.
        by_group: makes of the keys that have arrived those of each group.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        route: Route,
        table_of_run: torch.Tensor,
        lengths: torch.Tensor,
        lengths_by_table: list[list[int]],
        send_occurrences: bool,
        takes_gradients: bool,
        by_group: Callable[[GroupKeys], list[GroupKeys]],
    ) -> None:
        super().__init__()
        unique = route.unique
        assert unique is not None
        self._table_of_run, self._lengths, self._lengths_by_table = table_of_run, lengths, lengths_by_table
        self._takes_gradients, self._by_group = takes_gradients, by_group
        self._sent = with_occurrences(unique) if send_occurrences else unique.keys.unsqueeze(1)
        self._received = self._sent.new_empty(sum(route.receive_counts), self._sent.shape[1])
        self._work = dist.all_to_all_single(
            self._received, self._sent, route.receive_counts, route.send_counts, group=pg, async_op=True
        )

    def _wait_impl(self) -> OwnedKeys:
        self._work.wait()
        columns = self._received.t().contiguous()
        keys = GroupKeys(
            keys=columns[0],
            tables=repeat(self._table_of_run, self._lengths, columns.shape[1]),
            occurrences=columns[1] if columns.shape[0] > 1 else None,
            lengths_by_table=self._lengths_by_table,
        )
        return OwnedKeys(self._by_group(keys), self._takes_gradients)
