"""A training step of a row-wise sharded ``EmbeddingCollection``, dynamic beside TorchRec's own, on gloo ranks.

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

__all__ = ["FULL", "QUICK", "Size", "measure"]

WORLD_SIZE = 2
EPS = 1e-8
#: Both sides sum the gradients of an id in different orders, on two ranks; see the table's benchmark.
CHECK_RTOL = 1e-4
CHECK_ATOL = 1e-5
CHECK_STEPS = 3
BATCHES = 16
#: Ids of one sample.
POOLING = 8


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        tables: by which the rows and the ids are divided.
        rows: of all tables together.
        dim: columns.
        ids: of all ranks together in a step.
        rounds, warm_up: rounds that count, and before them.
        threads: of each rank.
    """

    tables: tuple[int, ...]
    rows: int
    dim: int
    ids: int
    rounds: int
    warm_up: int
    threads: int = 1


FULL = Size(tables=(1, 26), rows=1_000_000, dim=64, ids=65_536, rounds=30, warm_up=6)
QUICK = Size(tables=(1,), rows=100_000, dim=64, ids=16_384, rounds=6, warm_up=2)


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
    topology = Topology(world_size=WORLD_SIZE, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)
    # torchrec's index deduplication has no kernel for the CPU.
    return _sharded(_collection(size, tables), planner, EmbeddingCollectionSharder(use_index_dedup=False))


def _dynamic(size: Size, tables: int) -> DistributedModelParallel:
    initializer = DynamicEmbInitializerArgs(lower=-INITIAL_BOUND, upper=INITIAL_BOUND)
    options = DynamicEmbTableOptions(
        max_capacity=roomy_capacity(size.rows // tables // WORLD_SIZE),
        initializer_args=initializer,
    )
    constraints = {
        f"t{index}": DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=options)
        for index in range(tables)
    }
    topology = Topology(world_size=WORLD_SIZE, compute_device="cpu")
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


def _insert_every_id(model: nn.Module, size: Size, tables: int) -> None:
    rows = size.rows // tables // POOLING * POOLING
    rows_at_once = max(size.ids // tables // POOLING, 1) * POOLING
    for ids in torch.arange(rows).split(rows_at_once):
        _values(model, _features([ids] * tables))


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


def _measure_on_rank(size: Size, tables: int) -> tuple[dict[str, list[Laps]], float]:
    """Laps of both collections, and the distinct ids of a rank's batch."""
    law = PowerLaw(size.rows // tables // POOLING * POOLING, seed=dist.get_rank())
    ids_of_table = size.ids // WORLD_SIZE // tables // POOLING * POOLING
    draws = [[law.draw(ids_of_table) for _ in range(tables)] for _ in range(BATCHES)]
    batches = [_features(ids_by_table) for ids_by_table in draws]
    gradients = [torch.randn(ids_of_table, size.dim) for _ in range(tables)]
    dynamic, static = _dynamic(size, tables), _static(size, tables)
    _insert_every_id(dynamic, size, tables)
    _copy_rows(dynamic, static, size, tables)
    _check(dynamic, static, batches, gradients)
    contenders = {
        "dynamic": _step(dynamic, batches, gradients),
        "static": _step(static, batches, gradients),
    }
    laps = interleaved(contenders, size.rounds, size.warm_up)
    return laps, sum(mean_unique(column) for column in zip(*draws, strict=True))


def _figures(size: Size, tables: int, laps: dict[str, list[Laps]], unique: float) -> list[Figure]:
    name = "one table" if tables == 1 else f"{tables} tables"
    static = TORCHREC_MILLISECONDS * size.ids * size.dim / (FULL.ids * FULL.dim)
    share = unique * WORLD_SIZE / size.ids
    # The sender sorts its ids, the owner the distinct ones of both senders.
    sorts = sort_milliseconds((1 + share) * size.ids / WORLD_SIZE)
    dynamic = static * share + sorts
    phases = [
        Figure(f"{name}: {label}, {phase}", "ms", milliseconds(laps[side], phase))
        for label, side in (("dynamic", "dynamic"), ("TorchRec", "static"))
        for phase in ("forward", "backward")
    ]
    return [
        *phases,
        Figure(f"{name}: dynamic, step", "ms", milliseconds(laps["dynamic"]), dynamic,
               f"TorchRec's step with {share:.0%} of the ids, the distinct ones, and two sorts, {REASON}"),
        Figure(f"{name}: TorchRec, step", "ms", milliseconds(laps["static"]), static, f"one table, {REASON}"),
        Figure(f"{name}: dynamic / TorchRec", "×", ratio(laps["dynamic"], laps["static"]), dynamic / static,
               "quotient of the two expectations", Target(1.0, at_least=False)),
    ]  # fmt: skip


def measure(size: Size) -> Findings:
    """Measures a collection of one table, and one of many.

    Raises:
        CheckError: the two collections do not give the same rows.
    """
    figures: list[Figure] = []
    series: dict[str, list[float]] = {}
    for tables in size.tables:
        laps, unique = on_ranks(WORLD_SIZE, size.threads, _measure_on_rank, size, tables)
        figures += _figures(size, tables, laps, unique)
        for side, side_laps in laps.items():
            for phase in ("forward", "backward"):
                series[f"{tables} table(s), {side}, {phase}, ms"] = [1e3 * lap[phase] for lap in side_laps]
    return Findings(
        name="collection_step",
        title="A training step of a row-wise sharded EmbeddingCollection, beside TorchRec's own",
        setup=(
            f"{WORLD_SIZE} gloo ranks with {size.threads} thread each, dim {size.dim}, row-wise Adagrad, {size.ids:,} "
            f"ids a step over both ranks from a power law over {size.rows:,} ids, all of them in the tables; both "
            f"collections in the same processes in turn, {size.rounds} rounds after {size.warm_up}, time of the slower "
            "rank."
        ),
        check=(
            f"Rows of the first step equal bit for bit, of the {CHECK_STEPS - 1} after it within {CHECK_RTOL:g}; "
            "nothing evicted."
        ),
        figures=figures,
        series=series,
    )
