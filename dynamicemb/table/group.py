"""A group of tables: the steps of a training lookup, of an evaluation lookup and of an update, in their order.

Each step launches the same few kernels whatever the number of tables. Host memory of the group's own is limited to what
decides about growth; everything that changes in a step is on the device.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from dynamicemb.errors import ConfigError, DynamicEmbWarning
from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.fill import fill, fill_missing
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.insert import insert
from dynamicemb.kernels.layout import NO_SLOT
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.kernels.tally import tally
from dynamicemb.kernels.update import HyperparameterColumn, update
from dynamicemb.kernels.views import KeyBatch, KeyStatus, Scores, ScoreSource, UniqueKeys
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.table.capture import is_captured
from dynamicemb.table.changes import GroupChanges
from dynamicemb.table.config import TableConfig
from dynamicemb.table.contents import StoredRows, TableContents
from dynamicemb.table.initializers import initializer_view
from dynamicemb.table.optimizers import ignored_weight_decay
from dynamicemb.table.storage import GroupStorage, state_memory

__all__ = ["TableCounters", "TableGroup", "TableProgress", "TrainingLookup"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableCounters:
    """What happened to one table on one rank since it was made. Keys are counted once in each training lookup.

    Attributes:
        size: rows in the table.
        hits: keys that were there.
        misses: keys that were not; some of them were inserted, the others refused.
        evicted: rows that gave way to others.
        refused: keys that found no place.
    """

    size: int
    hits: int
    misses: int
    evicted: int
    refused: int


@dataclass(frozen=True)
class TableProgress:
    """How far the training of one table on one rank has come: all that matters to its future besides its rows.

    Attributes:
        clock: training lookups.
        steps: updates.
        custom_score: the score that touched keys get under CUSTOMIZED.
        hits, evicted, refused: see :class:`TableCounters`.
        hyperparameters: in the order of :data:`~dynamicemb.table.optimizers.HYPERPARAMETERS`.
    """

    clock: int
    steps: int
    custom_score: int
    hits: int
    evicted: int
    refused: int
    hyperparameters: tuple[float, ...]


@dataclass(frozen=True)
class TrainingLookup:
    """What a training lookup leaves behind for the update that follows it.

    Attributes:
        unique: the batch.
        slots: int64 [U], slot handle of each distinct key, −1 for a refused one.
        generation: the group's generation when the slots were found.
        number: of the lookup, among all of the group.
    """

    unique: UniqueKeys
    slots: torch.Tensor
    generation: int
    number: int


class TableGroup:
    """Tables that share a row layout, a bucket capacity, an eviction strategy and a mode of weight decay.

    Args:
        configs: the tables; they have the same ``group_key``.
        world_size: ranks that share them; this one holds the keys that :func:`~dynamicemb.kernels.hashing.owners`
            gives it.
        device: where they live.
    """

    @state_memory()
    def __init__(self, configs: Sequence[TableConfig], world_size: int, device: torch.device) -> None:
        if len({config.group_key for config in configs}) != 1:
            names = [config.name for config in configs]
            raise ConfigError(f"the tables {names} cannot share a group: their rows, buckets or strategies differ")
        self.configs = list(configs)
        self.world_size = world_size
        self.device = device
        self.evict_strategy = configs[0].evict_strategy
        self._weight_decay_mode = configs[0].optimizer.applied_weight_decay
        names, seeds = [config.name for config in configs], [config.seed for config in configs]
        geometries = [config.geometry() for config in configs]
        self.storage = GroupStorage(geometries, configs[0].layout, world_size, device, names)
        states = [config.optimizer.initial_state for config in configs]
        self._initializer = initializer_view(names, seeds, [config.initializer for config in configs], states, device)
        self._eval_initializer = initializer_view(
            names, seeds, [config.eval_initializer for config in configs], states, device
        )
        self._missing_reads_as_zeros = all(config.missing_reads_as_zeros for config in configs)
        tables = len(configs)
        #: Step clock: training lookups so far. int64 [T].
        self.clock = torch.zeros(tables, dtype=torch.int64, device=device)
        #: Update steps so far. int64 [T].
        self.steps = torch.zeros(tables, dtype=torch.int64, device=device)
        #: Score of new and touched keys under CUSTOMIZED. int64 [T].
        self.custom_scores = torch.zeros(tables, dtype=torch.int64, device=device)
        self.hyperparameters = torch.tensor(
            [config.optimizer.hyperparameters() for config in configs], dtype=torch.float64, device=device
        )
        #: For checkpoints of what has changed since an earlier one.
        self.changes = GroupChanges(self.storage, self.clock, self.evict_strategy is DynamicEmbEvictStrategy.LRU)
        # Tables that take the update under way, bool [T], where not all of them do; and the same on the host.
        self._trained, self._trained_on_host = torch.ones(tables, dtype=torch.bool, device=device), [True] * tables
        # Keys by what became of them, int64 [T, len(KeyStatus)].
        self._outcomes = torch.zeros(tables, len(KeyStatus), dtype=torch.int64, device=device)
        # Changes whenever slots found earlier may belong to another key now.
        self._generation = 0
        # Upper bound of the sum of all sizes, so that a table that cannot need to grow is not asked for its size.
        self._size_bounds = [0] * tables

    # ------------------------------------------------------------------------------------------------ lookups

    def train_lookup(
        self,
        keys: torch.Tensor,
        tables: torch.Tensor,
        counts: Optional[torch.Tensor] = None,
        lengths_by_table: Optional[Sequence[Sequence[int]]] = None,
        unique: Optional[UniqueKeys] = None,
    ) -> tuple[torch.Tensor, TrainingLookup]:
        """Finds the keys, inserts those that are absent, and reads their rows.

        Args:
            keys: int64 [N], all owned by this rank, repetitions allowed.
            tables: int32 [N], table of each key.
            counts: int64 [N], occurrences that each entry stands for; None: one each.
            lengths_by_table: what the host knows of the order of the keys, see
                :func:`~dynamicemb.kernels.dedup.dedup`.
            unique: the keys deduplicated, where that has been done before.

        Returns:
            The rows, float32 [N, dim] (zeros for refused keys), and what :meth:`apply_gradients` needs.

        Raises:
            ConfigError: the lookup is being captured in a CUDA graph, and a table can still grow. Nothing has changed.
            OutOfMemoryError: a table must grow, or changes are to be noted, and the device has no room for it. Nothing
                has changed.
        """
        if unique is None:
            unique = dedup(keys, tables, len(self.configs), self.world_size, lengths_by_table)
        if self.storage.growable:
            self._grow_for(unique, lengths_by_table or [[keys.numel()] * len(self.configs)])
        log = self.changes.log()  # before anything changes: it may need memory
        scores = self._scores(unique, counts)
        status = torch.empty(unique.keys.shape, dtype=torch.int8, device=self.device)
        slots = find(self.storage.view, unique, scores, self.evict_strategy is DynamicEmbEvictStrategy.LFU, status)
        self._generation += 1
        insertion = insert(self.storage.view, unique, slots, scores, status)
        fill(self.storage.view, unique, slots, insertion.status, self._initializer)
        evicted = tally(unique, insertion.status, self._outcomes, self.clock, log)
        self.changes.looked_up(unique, slots, insertion, evicted)
        rows = gather(self.storage.view, slots, unique.inverse)
        return rows, TrainingLookup(unique, slots, self._generation, self.changes.lookups)

    def eval_lookup(self, keys: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """Reads the rows of keys, changing nothing; absent keys read as the evaluation initializer says.

        Args:
            keys: int64 [N], all owned by this rank.
            tables: int32 [N].

        Returns:
            float32 [N, dim].
        """
        slots = find(self.storage.view, KeyBatch(keys, tables))
        rows = gather(self.storage.view, slots)
        if not self._missing_reads_as_zeros:
            fill_missing(rows, keys, tables, slots, self._eval_initializer, self.storage.layout.embedding_dtype)
        return rows

    def apply_gradients(
        self, lookup: TrainingLookup, gradients: torch.Tensor, trained: Optional[Sequence[bool]] = None
    ) -> None:
        """One optimizer step for every distinct key of a training lookup.

        If other lookups came in between, the keys are looked up again; one that has been evicted meanwhile has no row
        left to update and is passed over, as is one that was refused.

        Args:
            lookup: of the batch.
            gradients: [N, dim], of the rows that the lookup returned.
            trained: for each table whether it takes the step; the others stay as they are, their count of steps too.
                None: all.
        """
        if trained is not None and not any(trained):
            return
        slots = lookup.slots
        if lookup.generation != self._generation:
            found = find(self.storage.view, lookup.unique)
            # A key that was refused read as zeros: its gradient is not that of a row that it may have by now.
            slots = torch.where(slots == NO_SLOT, slots, found)
        takes_step = None if trained is None else self._on_device(trained)
        if takes_step is not None:
            slots = torch.where(takes_step.index_select(0, lookup.unique.tables), slots, NO_SLOT)
        update(
            self.storage.view, lookup.unique, slots, gradients.contiguous(), self.hyperparameters, self.steps,
            self._weight_decay_mode, takes_step,
        )  # fmt: skip
        self.changes.updated(lookup.number, lookup.unique, slots)

    # ------------------------------------------------------------------------------------------------ steps

    def _on_device(self, trained: Sequence[bool]) -> torch.Tensor:
        """bool [T]. Written where it has changed, without a copy from the host, so that nothing waits."""
        if is_captured(self.device):
            # A graph has its own: it runs when others have written to this one, and what it captures has not run yet.
            captured = torch.ones_like(self._trained)
            for table, takes_step in enumerate(trained):
                if not takes_step:
                    captured[table].fill_(False)
            return captured
        for table, takes_step in enumerate(trained):
            if takes_step != self._trained_on_host[table]:
                self._trained[table].fill_(takes_step)
                self._trained_on_host[table] = takes_step
        return self._trained

    def _scores(self, unique: UniqueKeys, counts: Optional[torch.Tensor]) -> Scores:
        """What a touched key's score becomes (LFU: grows by) and a new key's score begins with."""
        if self.evict_strategy is DynamicEmbEvictStrategy.LRU:
            return Scores(self.clock, ScoreSource.NEXT)
        if self.evict_strategy is DynamicEmbEvictStrategy.CUSTOMIZED:
            return Scores(self.custom_scores, ScoreSource.TABLE)
        if counts is None:
            return Scores(unique.offsets, ScoreSource.DIFFERENCE)
        return Scores(segment_sum(counts, unique))

    def _grow_for(self, unique: UniqueKeys, lengths_by_table: Sequence[Sequence[int]]) -> None:
        """Doubles tables until the rows they hold and the batch's new keys stay within max_load_factor.

        Asks the device only when a table that may grow could have become too full since it was asked last.

        Args:
            unique: the batch.
            lengths_by_table: for each part of the batch, how many keys of each table it has at most.

        Raises:
            ConfigError: the batch is being captured in a CUDA graph.
            OutOfMemoryError: the device has no room for a doubling.
        """
        if is_captured(self.device):
            raise self._cannot_grow()
        suspects = []
        for table in self.storage.growable:
            self._size_bounds[table] += sum(lengths[table] for lengths in lengths_by_table)
            limit = self.configs[table].max_load_factor * self.storage.geometries[table].slots
            if self._size_bounds[table] > limit:
                suspects.append(table)
        if not suspects:
            return
        absent = find(self.storage.view, unique) == NO_SLOT
        absent &= torch.arange(absent.numel(), device=self.device) < unique.count
        new_keys = torch.zeros(len(self.configs), dtype=torch.int64, device=self.device)
        new_keys.index_add_(0, torch.where(absent, unique.tables.long(), 0), absent.long())
        demand = (self._sizes() + new_keys).tolist()
        for table in suspects:
            self._size_bounds[table] = demand[table]
            self._grow_table(table, demand[table])

    def _cannot_grow(self) -> ConfigError:
        """Growth is decided on the host, which has no part in the replay of a graph."""
        table = self.storage.growable[0]
        name, size = self.configs[table].name, self.storage.geometries[table]
        return ConfigError(
            f"a CUDA graph cannot make a table grow, and table '{name}' has {size.slots} slots on this rank, of at "
            f"most {size.max_slots}: its replays would evict rows instead; capture the graph when the table has all of "
            "them, or give it init_capacity=max_capacity"
        )

    def _grow_table(self, table: int, rows: int) -> None:
        config = self.configs[table]
        while (size := self.storage.geometries[table]).can_grow and rows > config.max_load_factor * size.slots:
            self.storage.double(table)
            self._generation += 1
            self.changes.grown(table, size)
            logger.info(
                "table '%s' grew from %d to %d slots (%d at most) to hold %d rows",
                config.name, size.slots, self.storage.geometries[table].slots, size.max_slots, rows,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ inspection

    def _sizes(self) -> torch.Tensor:
        return self._outcomes[:, KeyStatus.INSERTED]

    def refused(self) -> torch.Tensor:
        """Keys refused so far, int64 [T], on the device."""
        return self._outcomes[:, KeyStatus.REFUSED].clone()

    def outcomes(self, table: int) -> torch.Tensor:
        """What became of the keys of one table so far: int64 by KeyStatus, on the device. Not to be written to."""
        return self._outcomes[table]

    def counters(self) -> list[TableCounters]:
        """One for each table. Waits for the device."""
        result = []
        for found, inserted, replaced, refused in self._outcomes.tolist():
            result.append(TableCounters(inserted, found, inserted + replaced + refused, replaced, refused))
        return result

    def stored_rows(self, table: int) -> StoredRows:
        """A copy of everything in one table, in canonical order. Waits for the device."""
        return self.contents(table).all()

    def contents(self, table: int) -> TableContents:
        """What is in one table, to be walked through."""
        return TableContents(self.storage, table)

    def progress(self, table: int) -> TableProgress:
        """How far the training of one table has come. Waits for the device."""
        found, _, replaced, refused = self._outcomes[table].tolist()
        return TableProgress(
            clock=int(self.clock[table]),
            steps=int(self.steps[table]),
            custom_score=int(self.custom_scores[table]),
            hits=found,
            evicted=replaced,
            refused=refused,
            hyperparameters=tuple(self.hyperparameters[table].tolist()),
        )

    def restore(self, table: int, progress: TableProgress, rows: int) -> None:
        """Sets how far training has come, after the table's contents have been replaced by ``rows`` rows."""
        self.clock[table] = progress.clock
        self.steps[table] = progress.steps
        self.custom_scores[table] = progress.custom_score
        self._outcomes[table] = torch.tensor([progress.hits, rows, progress.evicted, progress.refused])
        self.hyperparameters[table] = torch.tensor(progress.hyperparameters, dtype=torch.float64)
        optimizer = self.configs[table].optimizer
        weight_decay = progress.hyperparameters[HyperparameterColumn.WEIGHT_DECAY]
        text = ignored_weight_decay(self.configs[table].name, optimizer, weight_decay)
        if text is not None and weight_decay != optimizer.weight_decay:  # of its own number the user knows
            warnings.warn(f"{text} (it is the number of the checkpoint)", DynamicEmbWarning, stacklevel=2)
        self._size_bounds[table] = rows
        self._generation += 1
        self.changes.restart(table)

    def reset(self, table: int) -> None:
        """Empties a table: it is as it was when it was made, but for hyperparameters and the customized score."""
        before = self.progress(table)
        try:
            self.contents(table).clear(self.configs[table].geometry())
        finally:  # it is empty even if there is no memory for its first size
            self.restore(table, dataclasses.replace(before, clock=0, steps=0, hits=0, evicted=0, refused=0), rows=0)

    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        """Takes effect with the next update. Does not synchronise."""
        # Assigning a number to an element would copy it from host memory, and wait.
        self.hyperparameters[table, HyperparameterColumn.LEARNING_RATE].fill_(learning_rate)

    def set_hyperparameters(self, numbers: Mapping[str, float]) -> None:
        """Sets numbers, named as in :data:`~dynamicemb.table.optimizers.HYPERPARAMETERS`, for all tables.

        They take effect with the next update. Does not synchronise.
        """
        for name, number in numbers.items():
            self.hyperparameters[:, HyperparameterColumn[name.upper()]].fill_(number)

    def set_steps(self, steps: int) -> None:
        """Sets how many updates every table has had: the next one is number ``steps + 1``. Does not synchronise."""
        self.steps.fill_(steps)
