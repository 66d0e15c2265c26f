"""Ids as logs have them, and the dynamic table that all benchmarks on one process measure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch

from dynamicemb import DynamicEmbEvictStrategy, DynamicEmbInitializerArgs, DynamicEmbInitializerMode
from dynamicemb.table.config import TableConfig
from dynamicemb.table.function import lookup
from dynamicemb.table.group import TableGroup
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = [
    "INITIAL_BOUND",
    "LEARNING_RATE",
    "POWER_LAW_EXPONENT",
    "DynamicTable",
    "PowerLaw",
    "mean_unique",
    "power_law_ranks",
    "roomy_capacity",
]

#: Of the power law: the k-th most popular id is drawn about k**-1.05 times as often as the first. 65,536 draws from a
#: million ids then have about 23,000 distinct ones.
POWER_LAW_EXPONENT = 1.05
LEARNING_RATE = 0.05
#: Bounds of the first values of a row.
INITIAL_BOUND = 0.001
ZEROS = DynamicEmbInitializerArgs(mode=DynamicEmbInitializerMode.CONSTANT)

Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


def power_law_ranks(uniform: Numbers, universe: int) -> Numbers:
    """Ranks in popularity, by the inverse of the law's distribution function over [1, universe + 1).

    Args:
        uniform: float64 [N], in [0, 1).
        universe: number of ids.

    Returns:
        float64 [N], from 1 to ``universe + 1``, of which the whole part counts (rounding can reach the upper end).
    """
    power = 1.0 - POWER_LAW_EXPONENT
    ranks: Numbers = ((float(universe + 1) ** power - 1.0) * uniform + 1.0) ** (1.0 / power)
    return ranks


class PowerLaw:
    """Ids 0 to ``universe - 1``, whose popularity follows a power law and has nothing to do with their order.

    Args:
        universe: number of ids.
        seed: of the draws; the popularity is the same for every seed.
    """

    def __init__(self, universe: int, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)
        self._id_by_rank = np.random.default_rng(universe).permutation(universe)

    @property
    def universe(self) -> int:
        return self._id_by_rank.size

    def every_id(self) -> torch.Tensor:
        """int64 [universe], in no particular order."""
        return torch.from_numpy(self._id_by_rank)

    def draw(self, count: int) -> torch.Tensor:
        """int64 [count], popular ids more often."""
        ranks = power_law_ranks(self._generator.random(count), self.universe)
        return torch.from_numpy(self._id_by_rank[np.minimum(ranks.astype(np.int64), self.universe) - 1])

    def draw_uniformly(self, count: int) -> torch.Tensor:
        """int64 [count], each id as likely as any other."""
        return torch.from_numpy(self._generator.integers(0, self.universe, count))


def mean_unique(batches: Iterable[torch.Tensor]) -> float:
    """Distinct ids of a batch, on average."""
    return float(np.mean([batch.unique().numel() for batch in batches]))


def roomy_capacity(rows: int) -> int:
    """Capacity at which ``rows`` rows fill two thirds of the slots: no bucket of 128 overflows, so none is evicted."""
    return max(rows + rows // 2, 1024)


class DynamicTable:
    """One table on one process, as :mod:`dynamicemb.shard` drives it.

    Args:
        dim: columns.
        capacity: rows that fit.
        optimizer: update rule.
        init_capacity: rows that fit at first; None: all of them.
        strategy: meaning of the scores.
        eval_initializer: what an absent id reads as; None: zeros.
    """

    def __init__(
        self,
        dim: int,
        capacity: int,
        optimizer: OptimizerConfig,
        init_capacity: int | None = None,
        strategy: DynamicEmbEvictStrategy = DynamicEmbEvictStrategy.LRU,
        eval_initializer: DynamicEmbInitializerArgs | None = None,
    ) -> None:
        initializer = DynamicEmbInitializerArgs(lower=-INITIAL_BOUND, upper=INITIAL_BOUND)
        config = TableConfig(
            name="items",
            dim=dim,
            max_capacity=capacity,
            init_capacity=capacity if init_capacity is None else init_capacity,
            evict_strategy=strategy,
            initializer=initializer,
            eval_initializer=eval_initializer or ZEROS,
            optimizer=optimizer,
        )
        self.group = TableGroup([config], world_size=1, device=torch.device("cpu"))
        self._anchor = torch.nn.Parameter(torch.empty(0, dim))

    def train(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ``ids``, inserted where absent; their gradient updates the table."""
        return lookup(self.group, self._anchor, ids, _first_table(ids), None, training=True)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ``ids``, changing nothing."""
        return lookup(self.group, self._anchor, ids, _first_table(ids), None, training=False)

    def fill(self, ids: torch.Tensor, step_ids: int) -> None:
        """Inserts ``ids``, ``step_ids`` in each step."""
        for batch in ids.split(step_ids):
            self.train(batch)


def _first_table(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(ids.numel(), dtype=torch.int32)
