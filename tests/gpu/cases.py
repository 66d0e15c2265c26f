"""What the engines are compared on: cases that meet every pair of choices, and three with ten million rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.kernels.update import WeightDecayMode
from dynamicemb.table.config import TableConfig
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["CHOICES", "FEW", "LARGE", "MATRIX", "MILLION", "Case", "pairs"]

MILLION = 1 << 20

_MODES = DynamicEmbInitializerMode
#: One after the other for the tables of a group. Not DEBUG: its values overflow float16, and a NaN has no one pattern.
INITIALIZERS = (
    DynamicEmbInitializerArgs(mode=_MODES.UNIFORM, lower=-0.5, upper=0.75),
    DynamicEmbInitializerArgs(mode=_MODES.NORMAL, mean=0.125, std_dev=0.5),
    DynamicEmbInitializerArgs(mode=_MODES.TRUNCATED_NORMAL, lower=-1.0, upper=2.0),
    DynamicEmbInitializerArgs(mode=_MODES.CONSTANT, value=0.3),
)
#: Those without the normal quantile, for which kernels are compiled on their own where a group has no others.
PLAIN_INITIALIZERS = (INITIALIZERS[0], INITIALIZERS[3])
ZEROS = DynamicEmbInitializerArgs(mode=_MODES.CONSTANT)


@dataclass(frozen=True)
class Case:
    """A group of tables on one rank, and the size of its batches.

    Attributes:
        dim, dtype, optimizer: of every row.
        policy: what a full bucket evicts.
        bucket_capacity: slots of a bucket.
        tables: in the group.
        ranks: (rank, world size).
        grows: whether the tables begin at a sixteenth of their size.
        rows: of all tables together, on this rank.
        batch: keys of a lookup.
    """

    dim: int
    dtype: torch.dtype
    optimizer: OptimizerKind
    policy: DynamicEmbEvictStrategy
    bucket_capacity: int
    tables: int
    ranks: tuple[int, int]
    grows: bool
    rows: int
    batch: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        rank, world_size = self.ranks
        growth = "-grows" if self.grows else ""
        return (
            f"{self.dim}-{dtype}-{self.optimizer.name.lower()}-{self.policy.value}-buckets_of_{self.bucket_capacity}"
            f"-{self.tables}_tables-rank_{rank}_of_{world_size}{growth}"
        )

    @property
    def rank(self) -> int:
        return self.ranks[0]

    @property
    def world_size(self) -> int:
        return self.ranks[1]

    def toy(self, most_slots: int = 8) -> Case:
        """The same choices in a moment: at most two tables, of a few buckets of at most ``most_slots`` slots."""
        capacity, tables = min(self.bucket_capacity, most_slots), min(self.tables, 2)
        rows = 4 * capacity * tables
        return dataclasses.replace(self, rows=rows, batch=rows // 4, bucket_capacity=capacity, tables=tables)

    def configs(self) -> list[TableConfig]:
        """The tables: unlike each other in size, initializers and every number of the optimizer."""
        weights = [1.0 + index / 2 for index in range(self.tables)]
        return [self._config(index, int(self.rows * weight / sum(weights))) for index, weight in enumerate(weights)]

    def _eval_initializer(self, index: int) -> DynamicEmbInitializerArgs:
        """Absent keys of one table alone read as zeros, which takes another path."""
        if self.tables == 1:
            return ZEROS
        initializers = PLAIN_INITIALIZERS if self.dim in (4, 128) else INITIALIZERS
        return initializers[(index + 1) % len(initializers)]

    def _config(self, index: int, rows: int) -> TableConfig:
        return TableConfig(
            name=f"table {index}",
            dim=self.dim,
            max_capacity=rows,
            init_capacity=rows // 16 if self.grows else rows,
            embedding_dtype=self.dtype,
            bucket_capacity=self.bucket_capacity,
            max_load_factor=(0.75, 0.5)[index % 2],
            evict_strategy=self.policy,
            initializer=INITIALIZERS[(index + self.dim // 4) % len(INITIALIZERS)],
            eval_initializer=self._eval_initializer(index),
            seed=self.dim,
            optimizer=OptimizerConfig(
                self.optimizer,
                learning_rate=0.05 / (1 + index),
                eps=(1e-8, 1e-3)[index % 2],
                beta1=0.9 - 0.05 * index,
                beta2=0.999 - 0.02 * index,
                weight_decay=(0.01, 0.0)[index % 2],
                initial_accumulator_value=(0.0, 0.1)[index % 2],
                weight_decay_mode=list(WeightDecayMode)[self.dim // 4 % 3],
            ),
        )


CHOICES: dict[str, Sequence[Any]] = {
    "dim": (4, 12, 64, 128, 1024),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "optimizer": tuple(OptimizerKind),
    "policy": tuple(DynamicEmbEvictStrategy),
    "bucket_capacity": (8, 32, 128, 256),
    "tables": (1, 3, 8),
    "ranks": ((0, 1), (1, 3), (7, 8)),
    "grows": (True, False),
}
# A quarter of a GiB of rows and 64 MiB in a batch, so that wide rows take no longer than narrow ones.
_TABLE_BYTES, _BATCH_BYTES = 1 << 28, 1 << 26


def pairs(chosen: Sequence[int]) -> set[tuple[int, int, int, int]]:
    """(choice, option, another choice, its option) that occur together where choice ``i`` is option ``chosen[i]``."""
    return {
        (*first, *second)
        for first, second in itertools.combinations(enumerate(chosen), 2)
    }  # fmt: skip


def _covering(sizes: Sequence[int]) -> list[list[int]]:
    """Few combinations of options in which every pair occurs: each is the best of some that have a missing one."""
    generator = random.Random(9)
    options = [(choice, option) for choice, size in enumerate(sizes) for option in range(size)]
    missing = {(*first, *second) for first, second in itertools.combinations(options, 2) if first[0] != second[0]}
    combinations = []
    while missing:
        candidates = []
        for _ in range(60):
            candidates.append([generator.randrange(size) for size in sizes])
            first, option, second, other = generator.choice(sorted(missing))
            candidates[-1][first], candidates[-1][second] = option, other
        combinations.append(max(candidates, key=lambda chosen: len(pairs(chosen) & missing)))
        missing -= pairs(combinations[-1])
    return combinations


def _case(chosen: Sequence[int]) -> Case:
    options = {name: values[option] for (name, values), option in zip(CHOICES.items(), chosen)}
    row_bytes = RowLayout(options["dim"], options["dtype"], options["optimizer"]).row_bytes
    rows = min(MILLION // 4, _TABLE_BYTES // row_bytes)
    return Case(**options, rows=rows, batch=min(rows // 4, _BATCH_BYTES // (4 * options["dim"])))


#: Every option of each choice beside every option of every other one.
MATRIX = [_case(chosen) for chosen in _covering([len(values) for values in CHOICES.values()])]

LRU, LFU, CUSTOMIZED = DynamicEmbEvictStrategy.LRU, DynamicEmbEvictStrategy.LFU, DynamicEmbEvictStrategy.CUSTOMIZED
#: Every optimizer, policy and dtype, for what need not be asked of each combination.
FEW = [
    Case(64, torch.float32, OptimizerKind.ADAM, LRU, 128, 1, (0, 1), True, MILLION, MILLION // 4),
    Case(128, torch.bfloat16, OptimizerKind.SGD, LFU, 32, 3, (1, 3), True, MILLION, MILLION // 4),
    Case(12, torch.float16, OptimizerKind.ADAGRAD, CUSTOMIZED, 8, 8, (7, 8), True, MILLION, MILLION // 4),
    Case(4, torch.float32, OptimizerKind.ROWWISE_ADAGRAD, LRU, 256, 3, (0, 1), True, MILLION, MILLION // 4),
]
#: Ten million rows, and as many keys through the lookups of each.
LARGE = [
    Case(32, torch.float32, OptimizerKind.ADAM, LRU, 128, 1, (0, 1), True, 10 * MILLION, MILLION),
    Case(128, torch.bfloat16, OptimizerKind.SGD, LFU, 256, 4, (0, 1), False, 10 * MILLION, MILLION),
    Case(8, torch.float16, OptimizerKind.ADAGRAD, CUSTOMIZED, 64, 2, (2, 3), True, 10 * MILLION, MILLION),
]
