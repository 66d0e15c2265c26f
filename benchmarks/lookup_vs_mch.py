"""Training lookups beside TorchRec's managed collisions, which also give ids of any size a row each.

TorchRec keeps the ids in a sorted array, looks them up by binary search, and lets ids in and out every
``eviction_interval`` steps. With an interval of 1 an id has its row from the second step on; longer intervals cost less
and leave new ids without one for as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from figures import CheckError, Figure, Findings, Spread, Target
from host import MemoryCosts
from reference import MCH_IDS_PER_SECOND, REASON, forward_milliseconds
from timing import Contender, Laps, interleaved, ratio
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import LFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule
from workload import DynamicTable, PowerLaw, mean_unique, roomy_capacity

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["FULL", "QUICK", "Size", "measure"]

BATCHES = 8
#: Ids are spread over 62 bits by a product with an odd number, which maps no two of them to one.
SPREAD_FACTOR = 0x1E3779B97F4A7C15
ID_MASK = 2**62 - 1


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        rows: ids, all of them in both tables.
        dim: columns.
        ids: of a step.
        rounds, warm_up: rounds that count, a multiple of every interval, and before them.
        intervals: TorchRec's eviction intervals; the target is about 1.
        threads: of torch.
    """

    rows: int
    dim: int
    ids: int
    rounds: int
    warm_up: int
    intervals: tuple[int, ...] = (1, 16)
    threads: int = 2


FULL = Size(rows=1_000_000, dim=64, ids=65_536, rounds=32, warm_up=2)
QUICK = Size(rows=100_000, dim=64, ids=16_384, rounds=4, warm_up=1, intervals=(1,))


def _features(ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=["item"], values=ids, lengths=torch.ones(ids.numel(), dtype=torch.int64))


class MchTable:
    """TorchRec's managed collisions in front of an ``EmbeddingCollection`` of one table; the least frequent ids go."""

    def __init__(self, size: Size, eviction_interval: int) -> None:
        # One row more than ids: the last one stands for every id that is not there.
        rows = size.rows + 1
        config = EmbeddingConfig(name="table", embedding_dim=size.dim, num_embeddings=rows, feature_names=["item"])
        self.remapper = MCHManagedCollisionModule(
            zch_size=rows,
            device=torch.device("cpu"),
            eviction_policy=LFU_EvictionPolicy(),
            eviction_interval=eviction_interval,
        )
        self.collection = EmbeddingCollection(tables=[config], device=torch.device("cpu"))
        self._module = ManagedCollisionEmbeddingCollection(
            self.collection, ManagedCollisionCollection({"table": self.remapper}, [config])
        )

    def train(self, ids: torch.Tensor) -> torch.Tensor:
        rows, _ = self._module(_features(ids))
        return rows["item"].values()

    def take_rows(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Stores ``rows`` where ``ids``, all of them present, have their places."""
        module = self._module.eval()
        places = module._managed_collision_collection(_features(ids)).values()
        module.train()
        if places.unique().numel() != ids.numel():
            raise CheckError("two ids share a row of TorchRec's table, which should hold all of them")
        with torch.no_grad():
            self.collection.embeddings["table"].weight[places] = rows


def _step(train: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor]) -> Contender:
    def step(index: int) -> Laps:
        start = time.perf_counter()
        train(batches[index % len(batches)])
        return {"lookup": time.perf_counter() - start}

    return step


def _in_windows(laps: list[Laps], interval: int) -> list[Laps]:
    """Time of each ``interval`` steps together, one of which changes what TorchRec's table holds."""
    return [
        {"lookup": sum(lap["lookup"] for lap in laps[first : first + interval])}
        for first in range(0, len(laps), interval)
    ]


def _millions_per_second(laps: list[Laps], ids: int) -> Spread:
    return Spread.of([1e-6 * ids / lap["lookup"] for lap in laps])


def _filled(size: Size, interval: int, every_id: torch.Tensor, rows: torch.Tensor) -> MchTable:
    table = MchTable(size, interval)
    # The module keeps room for as many ids as its first batch has, times its interval.
    for _ in range(interval):
        table.train(every_id)
    table.take_rows(every_id, rows)
    return table


def measure(size: Size) -> Findings:
    """Measures lookups of both, with a gradient to come.

    Raises:
        CheckError: the two sides do not give the same rows.
    """
    torch.set_num_threads(size.threads)
    costs, law = MemoryCosts.measured(), PowerLaw(size.rows)
    every_id = law.every_id() * SPREAD_FACTOR & ID_MASK
    batches = [law.draw(size.ids) * SPREAD_FACTOR & ID_MASK for _ in range(BATCHES)]
    optimizer = OptimizerConfig(OptimizerKind.ROWWISE_ADAGRAD)
    ours = DynamicTable(size.dim, roomy_capacity(size.rows), optimizer, strategy=DynamicEmbEvictStrategy.LFU)
    ours.fill(every_id, size.ids)
    contenders = {"ours": _step(ours.train, batches)}
    for interval in size.intervals:
        theirs = _filled(size, interval, every_id, ours.read(every_id))
        if not torch.equal(ours.train(batches[0]), theirs.train(batches[0])):
            raise CheckError(f"TorchRec's rows differ from ours with eviction interval {interval}")
        contenders[f"interval {interval}"] = _step(theirs.train, batches)
    laps = interleaved(contenders, size.rounds, size.warm_up)

    unique = mean_unique(batches)
    floor = 1e-6 * size.ids / costs.forward_seconds(size.ids, unique, size.dim * 4)
    known = 1e-3 * size.ids / forward_milliseconds(size.ids, unique)
    mch = 1e-6 * MCH_IDS_PER_SECOND * FULL.rows / size.rows
    figures = [
        Figure("dynamic table", "million ids/s", _millions_per_second(laps["ours"], size.ids), floor,
               "one sort, one bucket for each distinct id, one row for each id"),
    ]  # fmt: skip
    for interval in size.intervals:
        name = f"MCH, eviction interval {interval}"
        every_step = interval == 1
        theirs_in_windows = _in_windows(laps[f"interval {interval}"], interval)
        figures += [
            Figure(name, "million ids/s", _millions_per_second(theirs_in_windows, size.ids * interval),
                   mch if every_step else None, f"sorts all rows in every step, {REASON}" if every_step else ""),
            Figure(f"{name}: its time / ours", "×", ratio(theirs_in_windows, _in_windows(laps["ours"], interval)),
                   known / mch if every_step else None,
                   f"{known:.1f} and {mch:.1f} million ids/s, {REASON}" if every_step else "",
                   Target(10.0, at_least=True) if every_step else None),
        ]  # fmt: skip
    return Findings(
        name="lookup_vs_mch",
        title="Training lookups, beside TorchRec's managed collisions",
        setup=(
            f"{size.threads} threads, dim {size.dim}, least-frequent eviction, {size.ids:,} ids a step from a power "
            f"law over {size.rows:,} ids of 62 bits, all of them in both tables; forward alone, in training mode; all "
            f"in turn, {size.rounds} rounds after {size.warm_up}."
        ),
        check="The rows of a batch equal bit for bit; no two ids share a row.",
        figures=figures,
        series={f"{name}, ms": [1e3 * lap["lookup"] for lap in side] for name, side in laps.items()},
    )
