"""A training step of a row-wise sharded ``EmbeddingCollection``, dynamic beside TorchRec's own, on one or two ranks.

Both collections live in the same processes and take turns: input distribution, lookup, output distribution, the way
back, and the update.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from figures import CheckError, Figure, Findings, Target
from processes import on_ranks
from reference import REASON, TORCHREC_MILLISECONDS, sort_milliseconds
from timing import Contender, Laps, interleaved, milliseconds, ratio
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from workload import INITIAL_BOUND, LEARNING_RATE, PowerLaw, mean_unique, roomy_capacity

from dynamicemb import DynamicEmbInitializerArgs, DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterConstraints
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, table_statistics

__all__ = ["FULL", "QUICK", "Case", "Size", "measure"]

EPS = 1e-8
#: Both sides sum the gradients of an id in different orders, on two ranks; see the table's benchmark.
CHECK_RTOL = 1e-4
CHECK_ATOL = 1e-5
CHECK_STEPS = 3
BATCHES = 16
#: Ids of one sample.
POOLING = 8


@dataclass(frozen=True)
class Case:
    """One collection.

    Attributes:
        ranks: joined by gloo; together they have ``THREADS`` threads.
        tables: by which the rows and the ids are divided.
        ids: of all ranks together in a step.
    """

    ranks: int
    tables: int
    ids: int

    @property
    def name(self) -> str:
        tables = "one table" if self.tables == 1 else f"{self.tables} tables"
        ranks = "one rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}, {tables} of {self.ids // self.tables:,} ids"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        cases: one after the other.
        rows: of all tables together.
        dim: columns.
        rounds, warm_up: rounds that count, and before them.
    """

    cases: tuple[Case, ...]
    rows: int
    dim: int
    rounds: int
    warm_up: int


THREADS = 2
FULL = Size(
    cases=(Case(2, 1, 65_536), Case(2, 26, 65_536), Case(1, 26, 26 * 256), Case(1, 26, 26 * 8192)),
    rows=1_000_000,
    dim=64,
    rounds=30,
    warm_up=6,
)
QUICK = Size(cases=(Case(2, 1, 16_384), Case(1, 26, 26 * 256)), rows=100_000, dim=64, rounds=6, warm_up=2)


def _collection(size: Size, tables: int) -> EmbeddingCollection:
    configs = [
        EmbeddingConfig(
            name=f"t{index}", embedding_dim=size.dim, num_embeddings=size.rows // tables, feature_names=[f"f{index}"]
        )
        for index in range(tables)
    ]
    collection = EmbeddingCollection(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": LEARNING_RATE, "eps": EPS})
    return collection


def _sharded(collection: EmbeddingCollection, planner: Any, sharder: Any) -> DistributedModelParallel:
    return DistributedModelParallel(
        collection,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=planner.collective_plan(collection, [sharder], dist.group.WORLD),
        sharders=[sharder],
    )


def _static(size: Size, tables: int) -> DistributedModelParallel:
    constraints = {f"t{index}": ParameterConstraints(sharding_types=["row_wise"]) for index in range(tables)}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)
    # torchrec's index deduplication has no kernel for the CPU.
    return _sharded(_collection(size, tables), planner, EmbeddingCollectionSharder(use_index_dedup=False))


def _dynamic(size: Size, tables: int) -> DistributedModelParallel:
    initializer = DynamicEmbInitializerArgs(lower=-INITIAL_BOUND, upper=INITIAL_BOUND)
    options = DynamicEmbTableOptions(
        max_capacity=roomy_capacity(size.rows // tables // dist.get_world_size()),
        initializer_args=initializer,
    )
    constraints = {
        f"t{index}": DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=options)
        for index in range(tables)
    }
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = DynamicEmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)
    return _sharded(_collection(size, tables), planner, DynamicEmbeddingCollectionSharder())


def _features(ids_by_table: list[torch.Tensor]) -> KeyedJaggedTensor:
    """``POOLING`` ids for each sample, of every table."""
    lengths = [torch.full((ids.numel() // POOLING,), POOLING) for ids in ids_by_table]
    keys = [f"f{index}" for index in range(len(ids_by_table))]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(ids_by_table), lengths=torch.cat(lengths))


def _values(model: nn.Module, features: KeyedJaggedTensor) -> list[torch.Tensor]:
    """Rows of every feature; waits for what is under way."""
    return [jagged.values() for jagged in model(features).wait().values()]


def _insert_every_id(model: nn.Module, size: Size, case: Case) -> None:
    rows = size.rows // case.tables // POOLING * POOLING
    rows_at_once = max(case.ids // case.tables // POOLING, 1) * POOLING
    for ids in torch.arange(rows).split(rows_at_once):
        _values(model, _features([ids] * case.tables))


def _copy_rows(dynamic: nn.Module, static: nn.Module, size: Size, tables: int) -> None:
    """Gives the static tables the rows of the dynamic ones."""
    rows = size.rows // tables // POOLING * POOLING
    dynamic.eval()
    for name, parameter in static.state_dict().items():
        table = int(name.split(".")[-2].removeprefix("t"))
        ids = [torch.arange(rows) if index == table else torch.empty(0, dtype=torch.int64) for index in range(tables)]
        lengths = [torch.full((rows // POOLING,), POOLING if index == table else 0) for index in range(tables)]
        features = KeyedJaggedTensor(
            keys=[f"f{index}" for index in range(tables)], values=torch.cat(ids), lengths=torch.cat(lengths)
        )
        values = _values(dynamic, features)[table]
        for shard in parameter.local_shards():
            first = shard.metadata.shard_offsets[0]
            mine = values[first : first + shard.tensor.shape[0]]
            shard.tensor[: mine.shape[0]].copy_(mine)
    dynamic.train()


def _check(
    dynamic: nn.Module, static: nn.Module, batches: list[KeyedJaggedTensor], gradients: list[torch.Tensor]
) -> None:
    for index, batch in enumerate(batches[:CHECK_STEPS]):
        mine, theirs = _values(dynamic, batch), _values(static, batch)
        for row, other in zip(mine, theirs, strict=True):
            same = torch.equal(row, other) if index == 0 else torch.allclose(row, other, CHECK_RTOL, CHECK_ATOL)
            if not same:
                difference = (row - other).abs().max().item()
                raise CheckError(f"rows of step {index} differ from TorchRec's by up to {difference:g}")
        torch.autograd.backward(mine, gradients)
        torch.autograd.backward(theirs, gradients)
    evicted = sum(statistics.evicted for statistics in table_statistics(dynamic).values())
    if evicted:
        raise CheckError(f"{evicted} rows were evicted from tables that should hold all ids")


def _step(model: nn.Module, batches: list[KeyedJaggedTensor], gradients: list[torch.Tensor]) -> Contender:
    """Ranks begin together; a phase has taken as long as on the slowest of them."""

    def step(index: int) -> Laps:
        dist.barrier()
        start = time.perf_counter()
        values = _values(model, batches[index % len(batches)])
        middle = time.perf_counter()
        torch.autograd.backward(values, gradients)
        seconds = torch.tensor([middle - start, time.perf_counter() - middle], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return {"forward": seconds[0].item(), "backward": seconds[1].item()}

    return step


def _measure_on_rank(size: Size, case: Case) -> tuple[dict[str, list[Laps]], float]:
    """Laps of both collections, and the distinct ids of a rank's batch."""
    tables = case.tables
    law = PowerLaw(size.rows // tables // POOLING * POOLING, seed=dist.get_rank())
    ids_of_table = case.ids // case.ranks // tables // POOLING * POOLING
    draws = [[law.draw(ids_of_table) for _ in range(tables)] for _ in range(BATCHES)]
    batches = [_features(ids_by_table) for ids_by_table in draws]
    gradients = [torch.randn(ids_of_table, size.dim) for _ in range(tables)]
    dynamic, static = _dynamic(size, tables), _static(size, tables)
    _insert_every_id(dynamic, size, case)
    _copy_rows(dynamic, static, size, tables)
    _check(dynamic, static, batches, gradients)
    contenders = {
        "dynamic": _step(dynamic, batches, gradients),
        "static": _step(static, batches, gradients),
    }
    laps = interleaved(contenders, size.rounds, size.warm_up)
    return laps, sum(mean_unique(column) for column in zip(*draws, strict=True))


def _figures(size: Size, case: Case, laps: dict[str, list[Laps]], unique: float) -> list[Figure]:
    name = case.name
    static = TORCHREC_MILLISECONDS * case.ids * size.dim / (FULL.cases[0].ids * FULL.dim)
    share = unique * case.ranks / case.ids
    # A sender sorts its ids, an owner the distinct ones of all senders; a single rank is both at once.
    sorts = sort_milliseconds((1 + share * (case.ranks > 1)) * case.ids / case.ranks)
    dynamic = static * share + sorts
    phases = [
        Figure(f"{name}: {label}, {phase}", "ms", milliseconds(laps[side], phase))
        for label, side in (("dynamic", "dynamic"), ("TorchRec", "static"))
        for phase in ("forward", "backward")
    ]
    return [
        *phases,
        Figure(f"{name}: dynamic, step", "ms", milliseconds(laps["dynamic"]), dynamic,
               f"TorchRec's step with {share:.0%} of the ids, the distinct ones, and sorts, {REASON}"),
        Figure(f"{name}: TorchRec, step", "ms", milliseconds(laps["static"]), static, f"one table, {REASON}"),
        Figure(f"{name}: dynamic / TorchRec", "×", ratio(laps["dynamic"], laps["static"]), dynamic / static,
               "quotient of the two expectations", Target(1.0, at_least=False)),
    ]  # fmt: skip


def measure(size: Size) -> Findings:
    """Measures collections of one table and of many, on one rank and on several.

    Raises:
        CheckError: the two collections do not give the same rows.
    """
    figures: list[Figure] = []
    series: dict[str, list[float]] = {}
    for case in size.cases:
        laps, unique = on_ranks(case.ranks, THREADS // case.ranks, _measure_on_rank, size, case)
        figures += _figures(size, case, laps, unique)
        for side, side_laps in laps.items():
            for phase in ("forward", "backward"):
                series[f"{case.name}, {side}, {phase}, ms"] = [1e3 * lap[phase] for lap in side_laps]
    return Findings(
        name="collection_step",
        title="A training step of a row-wise sharded EmbeddingCollection, beside TorchRec's own",
        setup=(
            f"{THREADS} threads, divided among gloo ranks, dim {size.dim}, row-wise Adagrad, ids of a step from power "
            f"laws over {size.rows:,} ids, all of them in the tables; both collections in the same processes in turn, "
            f"{size.rounds} rounds after {size.warm_up}, time of the slowest rank."
        ),
        check=(
            f"Rows of the first step equal bit for bit, of the {CHECK_STEPS - 1} after it within {CHECK_RTOL:g}; "
            "nothing evicted."
        ),
        figures=figures,
        series=series,
    )
