"""Dumping and loading a table beside plain writes and reads of the same bytes, on gloo ranks and one disk.

The plain side has its bytes ready in memory: each rank writes its part of the same files, and waits, as a dump does,
until they are on disk. A load is compared with reading the same ranges into memory, from the page cache. A delta is
taken of a table of which a small part has been trained.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from figures import CheckError, Figure, Findings, Spread, Target
from processes import on_ranks
from timing import Contender, Laps, interleaved, milliseconds, ratio
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ShardingEnv
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from workload import LEARNING_RATE, roomy_capacity

from dynamicemb import DynamicEmbDump, DynamicEmbLoad, DynamicEmbTableOptions, incremental_dump
from dynamicemb.planner import DynamicEmbeddingShardingPlanner, DynamicEmbParameterConstraints
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, get_score, table_statistics
from dynamicemb.shard.tables import dynamic_tables

__all__ = ["FULL", "QUICK", "Size", "measure"]

WORLD_SIZE = 2
#: Least speed of a dump, as a share of that of plain writes.
LEAST_SHARE = 0.7
_PLAIN_BYTES = 16 << 20
_PARTS = ("keys", "values", "scores", "opt_sum")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    The rounds before those that count let both sides come to parts of the disk that have been written before: the first
    time takes some disks three times as long.

    Attributes:
        rows: of the table.
        dim: columns.
        ids: of a step that fills it, on each rank.
        touched: share of the rows that is trained before a delta.
        rounds, warm_up: rounds that count, and before them.
        threads: of each rank.
    """

    rows: int
    dim: int
    ids: int
    touched: float
    rounds: int
    warm_up: int
    threads: int = 1


FULL = Size(rows=1_500_000, dim=64, ids=65_536, touched=0.01, rounds=9, warm_up=4)
QUICK = Size(rows=100_000, dim=64, ids=16_384, touched=0.01, rounds=3, warm_up=1)


def _model(size: Size) -> nn.Module:
    config = EmbeddingConfig(name="t", embedding_dim=size.dim, num_embeddings=size.rows, feature_names=["f"])
    collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": LEARNING_RATE})
    options = DynamicEmbTableOptions(max_capacity=roomy_capacity(size.rows // WORLD_SIZE))
    planner = DynamicEmbeddingShardingPlanner(
        topology=Topology(world_size=WORLD_SIZE, compute_device="cpu"),
        constraints={"t": DynamicEmbParameterConstraints(use_dynamicemb=True, dynamicemb_options=options)},
        debug=False,
    )
    sharders = [DynamicEmbeddingCollectionSharder()]
    plan = planner.collective_plan(collection, sharders, dist.group.WORLD)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    return DistributedModelParallel(collection, env=env, device=torch.device("cpu"), plan=plan, sharders=sharders)


def _train(model: nn.Module, first: int, stop: int, size: Size) -> None:
    """One lookup of each of the ids, and an update."""
    rank = dist.get_rank()
    for start in range(first, stop, WORLD_SIZE * size.ids):
        count = min(WORLD_SIZE * size.ids, stop - start)
        begin, end = (start + count * part // WORLD_SIZE for part in (rank, rank + 1))
        ids = torch.arange(begin, end)
        features = KeyedJaggedTensor(["f"], values=ids, lengths=torch.tensor([ids.numel()]))
        model(features)["f"].values().sum().backward()


def _timed(action: Callable[[], None]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def _ranges(folder: Path) -> list[tuple[Path, int, int]]:
    """This rank's half of each file."""
    rank, ranges = dist.get_rank(), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        length = path.stat().st_size
        ranges.append((path, length * rank // WORLD_SIZE, length * (rank + 1) // WORLD_SIZE))
    return ranges


def _plain_write(ranges: list[tuple[Path, int, int]], source: Path, target: Path, data: memoryview) -> None:
    """Files beside those of the round before, which are removed at the end: so the disk has the same to do as for a
    dump, which keeps the old checkpoint until the new one is whole."""
    old = target.with_name("old")
    if dist.get_rank() == 0:
        if target.exists():
            target.rename(old)
        for path, _, _ in ranges:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
    dist.barrier()
    for path, first, stop in ranges:
        descriptor = os.open(target / path.relative_to(source), os.O_WRONLY)
        for offset in range(first, stop, len(data)):
            os.pwrite(descriptor, data[: min(len(data), stop - offset)], offset)
        os.fsync(descriptor)
        os.close(descriptor)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(old, ignore_errors=True)


def _plain_read(ranges: list[tuple[Path, int, int]], data: memoryview) -> None:
    for path, first, stop in ranges:
        descriptor = os.open(path, os.O_RDONLY)
        for offset in range(first, stop, len(data)):
            os.preadv(descriptor, [data[: min(len(data), stop - offset)]], offset)
        os.close(descriptor)


def _check(model: nn.Module, other: nn.Module, folder: Path, size: Size) -> None:
    rows = table_statistics(model)["t"].size
    if rows != size.rows:
        raise CheckError(f"{rows} of {size.rows} rows are in the table")
    DynamicEmbDump(folder / "again", other, optim=True)
    for name in _PARTS:
        files = [folder / one / "model" / f"t_{name}" for one in ("dump", "again")]
        if dist.get_rank() == 0 and files[0].read_bytes() != files[1].read_bytes():
            raise CheckError(f"{name}: what was dumped and loaded is dumped in other bytes")


def _on_rank(size: Size, folder: str) -> tuple[dict[str, list[Laps]], int, int]:
    """Laps by contender, bytes of the full checkpoint, bytes of the delta."""
    here, model, other = Path(folder), _model(size), _model(size)
    model.train()
    _train(model, 0, size.rows, size)
    DynamicEmbDump(here / "dump", model, optim=True)
    DynamicEmbLoad(here / "dump", other, optim=True)
    _check(model, other, here, size)
    _train(model, 0, WORLD_SIZE, size)  # a delta has the rows of the step that it begins at, too
    since = get_score(model)["t"]
    _train(model, 0, round(size.rows * size.touched), size)
    ranges = _ranges(here / "dump")
    data = memoryview(np.random.default_rng(dist.get_rank()).bytes(_PLAIN_BYTES))
    buffer = memoryview(bytearray(_PLAIN_BYTES))

    def contender(action: Callable[[], None]) -> Contender:
        return lambda index: {"step": _timed(action)}

    def plain_write() -> None:
        _plain_write(ranges, here / "dump", here / "plain", data)

    def load(index: int) -> Laps:
        table = dynamic_tables(other)[0]
        table.group.contents(0).clear(table.group.configs[0].geometry())
        return {"step": _timed(lambda: DynamicEmbLoad(here / "dump", other, optim=True))}

    laps = interleaved(
        {
            "dump": contender(lambda: DynamicEmbDump(here / "dump", model, optim=True)),
            "write": contender(plain_write),
            "delta": contender(lambda: incremental_dump(here / "delta", model, since, optim=True)),
            "load": load,
            "read": contender(lambda: _plain_read(ranges, buffer)),
        },
        size.rounds,
        size.warm_up,
    )
    return laps, *(sum(path.stat().st_size for path, _, _ in _ranges(here / name)) for name in ("dump", "delta"))


def measure(size: Size) -> Findings:
    """Times on two ranks and their quotients.

    Raises:
        CheckError: a table that was dumped and loaded is not the same.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:
        laps, full_bytes, delta_bytes = on_ranks(WORLD_SIZE, size.threads, _on_rank, size, folder)
    rows, part = f"{size.rows:,} rows, {full_bytes / 1e6:,.0f} MB", f"{size.touched:.0%} of the rows touched"
    figures = [
        Figure(f"{name}: {rows}", "ms", milliseconds(laps[contender]))
        for contender, name in (
            ("dump", "dump"), ("write", "plain write"), ("load", "load"), ("read", "plain read"),
        )
    ]  # fmt: skip
    figures += [
        Figure(f"delta: {part}, {delta_bytes / 1e6:,.1f} MB", "ms", milliseconds(laps["delta"])),
        Figure("speed of a dump / plain write", "×", ratio(laps["write"], laps["dump"]), 0.9,
               "copies and checksums overlap with the disk", Target(LEAST_SHARE, at_least=True)),
        Figure("speed of a load / plain read", "×", ratio(laps["read"], laps["load"]), 0.15,
               "a read from the page cache is one copy; a load checks order and checksums, and places each row"),
        Figure("delta / dump, time", "×", ratio(laps["delta"], laps["dump"]), 0.1,
               "17 bytes of metadata for each slot, and the rows touched"),
        Figure("delta / dump, bytes", "×", Spread.exact(delta_bytes / full_bytes), size.touched,
               "the rows touched, and a manifest"),
    ]  # fmt: skip
    return Findings(
        name="checkpoint",
        title="Dump, delta and load beside plain writes and reads of the same bytes",
        setup=(
            f"{WORLD_SIZE} gloo ranks with {size.threads} thread each, one table of dim {size.dim} in float32 with "
            f"row-wise Adagrad; both sides wait until all is on disk, and write {len(_PARTS)} files (the dump also "
            f"a manifest); loads into an empty table, reads from the page cache; {size.rounds} rounds after "
            f"{size.warm_up}, in turn, time of the slower rank."
        ),
        check="A table that was dumped, loaded and dumped again gave the same bytes.",
        figures=figures,
    )
