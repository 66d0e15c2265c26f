"""Deltas of models that are trained: with what they follow they are the later full dump, and cost what has changed."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from dynamicemb import (
    CheckpointError,
    ConfigError,
    DynamicEmbDump,
    DynamicEmbEvictStrategy,
    DynamicEmbLoad,
    RemoteRankError,
    incremental_dump,
)
from dynamicemb.checkpoint.files.reader import Checkpoint, StoredTable
from dynamicemb.checkpoint.files.schema import mixed_keys
from dynamicemb.checkpoint.merge import merge
from dynamicemb.shard import table_statistics
from dynamicemb.table import change_log
from dynamicemb.table.contents import TableContents
from tests.checkpoint.histories import files
from tests.checkpoint.models import contents, digests, model, train
from tests.distributed import run_on_ranks

STRATEGIES = list(DynamicEmbEvictStrategy)
COLLECTION = "model.embeddings"
#: Evictions and keys that are refused; a table that grows, then evicts.
SIZES: list[dict[str, Any]] = [{"capacity": 96}, {"capacity": 512, "init_capacity": 16, "max_load_factor": 0.8}]
IDS: dict[str, Any] = {"ids": 30, "distinct": 400}


def _do_not_synchronise() -> None:
    """No power cut is tested here, and the disk would take most of the time. Called on ranks, which end soon."""
    os.fsync = lambda descriptor: None


@dataclass(frozen=True)
class Written:
    """A checkpoint: of which step, and, if it is a delta, since which."""

    path: str
    clock: int
    since: Optional[int]


class Run:
    """A training run at random: steps, full dumps, deltas since any step that is known, resumed now and then.

    Every rank draws the same numbers.
    """

    def __init__(self, rank: int, world_size: int, folder: str, strategy: DynamicEmbEvictStrategy, seed: int) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, f"{folder}/{seed}"
        self.random = random.Random(seed)
        self.arguments = {**self.random.choice(SIZES), "strategy": strategy}
        self.custom = strategy is DynamicEmbEvictStrategy.CUSTOMIZED
        self.module = model(**self.arguments)
        self.clock = self.known_from = self.evicted = 0
        self.written: list[Written] = []
        self.wrong: list[str] = []

    def train(self, steps: int, *modules: torch.nn.Module) -> None:
        for module in modules or (self.module,):
            train(module, range(self.clock, self.clock + steps), self.rank, self.world_size, self.custom, **IDS)
        self.clock += steps

    def _path(self, kind: str) -> str:
        return f"{self.folder}/{kind}{len(self.written)}"

    def dump(self) -> None:
        self.written.append(Written(self._path("full"), self.clock, None))
        DynamicEmbDump(self.written[-1].path, self.module, optim=True)

    def dump_changes(self) -> None:
        earlier = self.random.choice([one for one in self.written if one.clock >= self.known_from])
        since = self.random.choice([earlier.path, Path(earlier.path), earlier.clock])
        self.written.append(Written(self._path("delta"), self.clock, earlier.clock))
        incremental_dump(self.written[-1].path, self.module, since, optim=True)

    def chain(self) -> list[str]:
        """One of the ways from a full checkpoint to the last delta."""
        chain = [self.written[-1]]
        while (since := chain[0].since) is not None:
            before = self.written[: self.written.index(chain[0])]
            chain.insert(0, self.random.choice([one for one in before if one.clock >= since]))
        return [one.path for one in chain]

    def check(self) -> None:
        """The chain, merged and loaded, against a full dump of now; sometimes training goes on from what was loaded."""
        chain, expected = self.chain(), f"{self._path('expected')}"
        DynamicEmbDump(expected, self.module, optim=True)
        if self.rank == 0:
            merge(chain, f"{expected}-merged")
            if files(Path(f"{expected}-merged")) != files(Path(expected)):
                self.wrong.append(f"merged {chain}")
        resumed = model(**self.arguments)
        DynamicEmbLoad(chain, resumed, optim=True)
        if contents(resumed) != contents(self.module):
            self.wrong.append(f"loaded {chain}")
        DynamicEmbDump(f"{expected}-loaded", resumed, optim=True)
        if files(Path(f"{expected}-loaded")) != files(Path(expected)):
            self.wrong.append(f"dumped {chain}")
        self.train(2, self.module, resumed)
        if contents(resumed) != contents(self.module):
            self.wrong.append(f"training from {chain}")
        if self.random.random() < 0.4:
            self.module, self.known_from = resumed, self.clock - 2

    def run(self, dumps: int) -> list[str]:
        self.train(self.random.randrange(3))
        self.dump()
        for _ in range(dumps):
            self.train(self.random.randrange(4))
            known = any(one.clock >= self.known_from for one in self.written)
            if known and self.random.random() < 0.8:
                self.dump_changes()
                if self.random.random() < 0.5:
                    self.check()
            else:
                self.dump()
        assert table_statistics(self.module)["t2"].evicted > 0
        return self.wrong


def _random_runs(rank: int, world_size: int, folder: str, strategy: DynamicEmbEvictStrategy, seeds: range) -> list[str]:
    _do_not_synchronise()
    return [problem for seed in seeds for problem in Run(rank, world_size, folder, strategy, seed).run(dumps=10)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [
        (1, range(3)),
        pytest.param(2, range(1), marks=pytest.mark.slow),
        pytest.param(3, range(1), marks=pytest.mark.slow),
    ],
)
def test_full_and_deltas_are_the_later_full_dump(
    world_size: int, seeds: range, strategy: DynamicEmbEvictStrategy, tmp_path: Path
) -> None:
    assert run_on_ranks(world_size, _random_runs, str(tmp_path), strategy, seeds) == [[]] * world_size


def _write_chain(rank: int, world_size: int, folder: str, first_step: int = 0) -> int:
    """``full``, ``delta1``, ``delta2``, each after four more steps, and ``later``, which is full again."""
    _do_not_synchronise()
    module = model(capacity=256)
    train(module, range(first_step, first_step + 4), rank, world_size)
    DynamicEmbDump(f"{folder}/full", module, optim=True)
    for number, since in ((1, f"{folder}/full"), (2, 8)):
        first = first_step + 4 * number
        train(module, range(first, first + 4), rank, world_size)
        incremental_dump(f"{folder}/delta{number}", module, since, optim=True)
    DynamicEmbDump(f"{folder}/later", module, optim=True)
    return table_statistics(module)["t0"].evicted


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    assert min(run_on_ranks(2, _write_chain, str(folder))) > 0
    return folder


@pytest.fixture
def own_chain(chain: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(chain, tmp_path / "chain"))


def _load_chain(rank: int, world_size: int, folder: str, target: str) -> list[tuple[str, str, str, int, int]]:
    _do_not_synchronise()
    ranges = []
    read_part = StoredTable.read_part

    def recorded(self: StoredTable, part: str, first: int, stop: int) -> Any:
        if stop - first > 1:  # a single row is looked at to find where a range begins
            ranges.append((self.folder.name, self.table, part, first, stop))
        return read_part(self, part, first, stop)

    StoredTable.read_part = recorded  # type: ignore[method-assign]
    module = model(capacity=1024)
    DynamicEmbLoad([f"{folder}/full", f"{folder}/delta1", f"{folder}/delta2"], module, optim=True)
    DynamicEmbDump(target, module, optim=True)
    return ranges


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loaded_at_any_number_of_ranks_every_byte_read_once(world_size: int, chain: Path, tmp_path: Path) -> None:
    results = run_on_ranks(world_size, _load_chain, str(chain), str(tmp_path / "loaded"))
    assert digests(tmp_path / "loaded") == digests(chain / "later")
    read: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for ranges in results:
        for checkpoint, table, part, first, stop in ranges:
            read.setdefault((checkpoint, table, part), []).append((first, stop))
    assert {part for _, _, part in read} == {"keys", "values", "scores", "opt_sum", "evicted"}
    for spans in read.values():
        spans.sort()
        assert all(0 <= after[0] - before[1] <= 1 for before, after in itertools.pairwise(spans))


def test_tombstones_are_keys_that_have_gone(chain: Path) -> None:
    for name in ("t0", "t1", "t2"):
        here, gone = [], []
        for checkpoint in ("full", "delta1", "delta2", "later"):
            with Checkpoint(chain / checkpoint) as opened:
                table = opened.table(name)
                here.append(set(table.read(0, table.rows).keys.tolist()))
                keys = [key for piece in table.evicted() for key in piece.tolist()] if table.record.since else []
                assert keys == sorted(keys, key=lambda key: int(mixed_keys(torch.tensor([key]).numpy())[0]))
                gone.append(set(keys))
        assert gone[1] and gone[2]
        assert here[3] == ((here[0] - gone[1] | here[1]) - gone[2]) | here[2]
        assert not gone[2] & here[3]


def _cost(rank: int, world_size: int, folder: str) -> tuple[int, int, int, int]:
    _do_not_synchronise()
    module = model(capacity=8192, tables=1)
    train(module, range(20), rank, world_size, ids=1000, distinct=4000)
    DynamicEmbDump(f"{folder}/full", module, optim=True)
    train(module, range(20, 21), rank, world_size, ids=10)
    read_into, rows = TableContents.read_into, []

    def counted(self: TableContents, run: Any, *targets: Any) -> None:
        rows.append(len(run))
        read_into(self, run, *targets)

    TableContents.read_into = counted  # type: ignore[method-assign]
    incremental_dump(f"{folder}/delta", module, 21, optim=True)
    sizes = [sum(file.stat().st_size for file in Path(folder, name).rglob("t0*")) for name in ("full", "delta")]
    incremental_dump(f"{folder}/nothing", module, f"{folder}/delta", optim=True)
    with Checkpoint(f"{folder}/nothing") as nothing, Checkpoint(f"{folder}/full") as full:
        assert nothing.table("t0").record.rows <= 10, "only rows of the last step, whose update might have come later"
        return *sizes, sum(rows) - nothing.table("t0").record.rows, full.table("t0").record.rows


def test_a_delta_costs_what_has_changed(tmp_path: Path) -> None:
    ((full_bytes, delta_bytes, rows_read, rows),) = run_on_ranks(1, _cost, str(tmp_path))
    row_bytes = 8 + 8 * 4 + 8 + 4
    assert full_bytes == rows * row_bytes and rows > 1000
    assert 0 < rows_read <= 10 and delta_bytes == rows_read * row_bytes


# ---------------------------------------------------------------------------------------------------- what is refused


def _refused(action: Callable[[], None], errors: tuple[type[Exception], ...], *words: str) -> None:
    with pytest.raises(errors) as raised:
        action()
    assert all(word in str(raised.value) for word in words), raised.value


def _refusals(rank: int, world_size: int, folder: str) -> None:
    _do_not_synchronise()
    module, base, only = model(tables=2), f"{folder}/base", {COLLECTION: ["t0"]}
    train(module, range(3), rank, world_size)

    def refused(since: Any, *words: str, name: str = "delta", error: Any = CheckpointError, **options: Any) -> None:
        """Every rank finds out, or rank 0 does and tells the others."""
        errors = (error,) if rank == 0 else (error, RemoteRankError)
        _refused(lambda: incremental_dump(f"{folder}/{name}", module, since, **options), errors, *words)

    refused(2, "since step 2 are not known", "only those since step 3", "full dump")
    DynamicEmbDump(base, module, only, optim=True)
    train(module, range(3, 5), rank, world_size)
    refused(6, "at step 5", "since step 6")
    for wrong in (-1, True, None, 1.5):
        refused(wrong, "is no step", error=ConfigError)
    refused(base, "base has no table 't1'", "table_names", optim=True)
    refused(base, "optim=True", table_names=only)
    refused(base, "holds a full checkpoint", "overwrite", name="base", table_names=only, optim=True)
    for same in (base, f"{folder}/../{os.path.basename(folder)}/base"):
        refused(same, "take the place", name="base", table_names=only, optim=True, overwrite=True)
    refused(f"{folder}/nowhere", "nowhere")
    assert os.listdir(folder) == ["base"]
    incremental_dump(f"{folder}/delta", module, base, only, optim=True)
    incremental_dump(f"{folder}/delta", module, 3, only, optim=True)
    incremental_dump(base, module, 3, only, optim=True, overwrite=True)
    with Checkpoint(base) as replaced, Checkpoint(f"{folder}/delta") as delta:
        assert replaced.manifest == delta.manifest and delta.manifest.kind == "delta"


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_cannot_be_a_delta_is_refused_on_all_ranks(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _refusals, str(tmp_path))


def _overflow(rank: int, world_size: int, folder: str) -> None:
    """There is no room for what rank 1 evicts, and all ranks are told."""
    _do_not_synchronise()
    change_log.MIN_REMEMBERED = change_log.MAX_REMEMBERED = 60 if rank == 1 else 1 << 16
    module = model(capacity=64)
    train(module, range(4), rank, world_size)
    DynamicEmbDump(f"{folder}/full", module)
    train(module, range(4, 12), rank, world_size)
    _refused(
        lambda: incremental_dump(f"{folder}/delta", module, f"{folder}/full"),
        (CheckpointError if rank == 1 else RemoteRankError,),
        "since step 4 are not known", "full dump", "room for evicted keys",
    )  # fmt: skip
    assert os.listdir(folder) == ["full"]
    DynamicEmbDump(f"{folder}/full", module)
    train(module, range(12, 13), rank, world_size, ids=8)
    incremental_dump(f"{folder}/delta", module, f"{folder}/full")
    DynamicEmbDump(f"{folder}/later", module)
    if rank == 0:
        merge([f"{folder}/full", f"{folder}/delta"], f"{folder}/merged")
        assert files(Path(folder, "merged")) == files(Path(folder, "later"))


def test_evictions_beyond_what_is_remembered_are_an_error(tmp_path: Path) -> None:
    run_on_ranks(2, _overflow, str(tmp_path))


def _not_loaded(rank: int, world_size: int, chains: list[tuple[list[str], tuple[str, ...]]]) -> None:
    module = model(capacity=256)
    train(module, range(2), rank, world_size)
    before = contents(module), table_statistics(module)
    for paths, words in chains:
        with pytest.raises((CheckpointError, RemoteRankError)) as raised:
            DynamicEmbLoad(paths, module, optim=True)
        assert all(word in str(raised.value) for word in words), raised.value
        assert (contents(module), table_statistics(module)) == before


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_what_is_no_chain_is_not_loaded(own_chain: Path, tmp_path: Path) -> None:
    run_on_ranks(2, _write_chain, str(tmp_path / "other"), 100)
    full, first, second = (str(own_chain / name) for name in ("full", "delta1", "delta2"))
    tampered = Path(shutil.copytree(first, tmp_path / "tampered"))
    _flipped(tampered / COLLECTION / "t1_evicted")
    chains = [
        ([], ("no checkpoint to load",)),
        ([first], ("a delta", "since step 4", "give the full checkpoint first")),
        ([first, second], ("a delta", "give the full checkpoint first")),
        ([full, second], ("a gap", "since step 8", "ends at step 4")),
        ([full, second, first], ("a gap",)),
        ([full, first, second, first], ("a wrong order", "step 8", "step 12")),
        ([full, first, full], ("can only be the first",)),
        ([full, str(tmp_path / "other" / "delta1"), second], ("other/delta1", "follows", "chain/full", "one run")),
        ([full, str(tampered), second], ("t1_evicted", "restore the file from a copy")),
    ]
    run_on_ranks(2, _not_loaded, chains)
