"""Checkpoints of different runs are not taken for one chain, however alike ids and steps are; those of one are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamicemb import CheckpointError, DynamicEmbDump, DynamicEmbLoad, incremental_dump
from dynamicemb.checkpoint.files.lineage import advanced, ancestor_of, described, followed, merged_history
from dynamicemb.checkpoint.files.manifest import PartRecord, TableRecord
from dynamicemb.checkpoint.inspection.verify import verify
from dynamicemb.checkpoint.merge import merge
from dynamicemb.table.ancestor import Ancestor
from tests.checkpoint.histories import History, files
from tests.checkpoint.models import contents, model
from tests.checkpoint.tables import record_of
from tests.distributed import run_on_ranks
from tests.shard.models import one_sample

#: Every step touches all of them: a delta has every row, and only the lineage tells one run from another.
IDS = torch.arange(40) * 977


class Run:
    """A training run with the learning rate ``lr`` in a folder of its own; all runs see the same ids."""

    def __init__(self, folder: Path, lr: float) -> None:
        self.folder, self.module = folder, model("sgd", tables=1)
        self.set_lr(lr)

    def set_lr(self, lr: float) -> None:
        for group in self.module.fused_optimizer.param_groups:
            group["lr"] = lr

    def train(self, steps: int, ids: torch.Tensor = IDS) -> None:
        self.module.train()
        for _ in range(steps):
            loss = self.module(one_sample({"t0": ids}))
            loss.backward()
            self.module.fused_optimizer.step()

    def full(self, name: str) -> Path:
        DynamicEmbDump(self.folder / name, self.module, optim=True)
        return self.folder / name

    def delta(self, name: str, since: int | Path) -> Path:
        incremental_dump(self.folder / name, self.module, since, optim=True)
        return self.folder / name

    def load(self, *paths: Path) -> None:
        DynamicEmbLoad(list(paths), self.module, optim=True)


def _refused(action: Callable[[], None], *words: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        action()
    assert all(word in str(raised.value) for word in words), raised.value


def _no_chain(folder: Path, *paths: Path) -> None:
    """Neither loaded nor merged, and the message names the two that do not belong together."""
    target = model("sgd", tables=1)
    before = contents(target)
    last_two = [str(path) for path in paths[-2:]]
    _refused(lambda: DynamicEmbLoad(list(paths), target, optim=True), *last_two, "follows", "one run")
    assert contents(target) == before
    _refused(lambda: merge(paths, folder / "refused"), *last_two, "follows", "one run")
    assert not (folder / "refused").exists()


def _chain(run: Run, *paths: Path) -> None:
    """Loaded it is the run's state; merged it is the run's next full dump."""
    target = model("sgd", tables=1)
    DynamicEmbLoad(list(paths), target, optim=True)
    assert contents(target) == contents(run.module)
    merge(paths, run.folder / "merged")
    assert files(run.folder / "merged") == files(run.full("as-of-now"))


def _two_runs(rank: int, world_size: int, folder: str) -> None:
    """The same ids at the same steps, another learning rate."""
    a, b = Run(Path(folder, "a"), 0.1), Run(Path(folder, "b"), 0.2)
    for run in (a, b):
        run.train(2)
        run.full("full")
        run.train(2)
        run.delta("by-path", run.folder / "full")
        run.delta("by-step", 2)
        run.train(1)
        run.delta("next", 4)
        run.delta("everything", 0)
    for name in ("by-path", "by-step", "everything"):
        _no_chain(a.folder, a.folder / "full", b.folder / name)
    _refused(lambda: merge([a.folder / "by-path", b.folder / "next"], a.folder / "merged"), "a/by-path", "b/next")
    _no_chain(a.folder, a.folder / "full", a.folder / "by-path", b.folder / "next")
    _refused(lambda: a.delta("wrong", b.folder / "full"), "b/full", "has not been in this state", "full dump")
    fresh = Run(Path(folder, "fresh"), 0.1)
    fresh.train(2)
    _refused(lambda: fresh.delta("wrong", a.folder / "full"), "has not been in this state", "none")
    for paths in (("full", "next"), ("by-path", "full")):
        with pytest.raises(CheckpointError):  # a gap, a wrong order: as before
            merge([a.folder / name for name in paths], a.folder / "merged")
    _chain(a, a.folder / "full", a.folder / "by-step", a.folder / "next")


def _diverging(rank: int, world_size: int, folder: str) -> None:
    """Two runs that go on from one checkpoint."""
    first = Run(Path(folder, "first"), 0.1)
    first.train(2)
    full = first.full("full")
    runs = [Run(Path(folder, name), 0.1) for name in ("a", "b", "c")]
    for run, lr in zip(runs, (0.1, 0.2, 0.3), strict=True):
        run.load(full)
        run.set_lr(lr)
    a, b, c = runs
    for run in (a, b):
        run.train(2)
        run.delta("1", full)
        run.delta("empty", 4)
        run.train(2, IDS[:10])
        run.delta("2", run.folder / "1")
    c.train(4)
    c.delta("since-full", full)
    _no_chain(a.folder, full, a.folder / "1", b.folder / "2")
    _no_chain(a.folder, full, a.folder / "1", a.folder / "empty", b.folder / "2")
    _no_chain(a.folder, full, a.folder / "1", b.folder / "empty")
    _no_chain(a.folder, full, a.folder / "1", c.folder / "since-full")
    _refused(lambda: a.delta("wrong", b.folder / "1"), "has not been in this state")
    _chain(a, full, a.folder / "1", a.folder / "2")
    _chain(b, full, b.folder / "1", b.folder / "empty", b.folder / "2")
    _chain(c, full, c.folder / "since-full")


def _one_run(rank: int, world_size: int, folder: str) -> None:
    """All ways to go on: resumed, dumped again, merged in between, deltas since any of its checkpoints."""
    run = Run(Path(folder), 0.1)
    run.train(2)
    full = run.full("full")
    assert files(run.full("again")) == files(full), "nothing has changed"
    run.train(1)
    one = run.delta("1", full)
    assert files(run.delta("1-again", full)) == files(one)
    merge([full, one], run.folder / "merged-1")
    run.train(1, IDS[:20])
    two = run.delta("2", one)
    over = run.delta("over", full)
    _chain(run, full, one, two)
    _chain(run, full, over)
    _chain(run, full, one, over)
    _chain(run, run.folder / "merged-1", two)
    merge([one, two], run.folder / "merged-2")
    _chain(run, full, run.folder / "merged-2")
    # Resumed from a chain, and from what it was merged to.
    for name, paths in (("resumed", (full, one, two)), ("from-merged", (run.folder / "merged",))):
        resumed = Run(run.folder / name, 0.1)
        resumed.load(*paths)
        assert files(resumed.full("at-once")) == files(run.full("as-of-now"))
        resumed.train(1, IDS[10:])
        three = resumed.delta("3", 4)
        _chain(resumed, full, one, two, three)
        _chain(resumed, run.folder / "merged", three)
        resumed.delta("3-by-path", two if name == "resumed" else run.folder / "merged")
        merge([run.folder / "merged-1", two, three], resumed.folder / "compact")
        resumed.train(1)
        _chain(resumed, resumed.folder / "compact", resumed.delta("4", resumed.folder / "compact"))


def _from_a_state_dict(rank: int, world_size: int, folder: str) -> None:
    """Where a state came from elsewhere, any checkpoint of its step may be of it, and none of another step is."""
    run, resumed = Run(Path(folder, "run"), 0.1), Run(Path(folder, "resumed"), 0.1)
    run.train(1)
    early = run.full("early")
    run.train(1)
    full = run.full("full")
    resumed.module.load_state_dict(run.module.state_dict())
    resumed.train(1)
    _chain(resumed, full, resumed.delta("by-path", full))
    resumed.module.load_state_dict(run.module.state_dict())
    resumed.train(1)
    by_step = resumed.delta("by-step", 2)
    _chain(resumed, full, by_step)
    resumed.module.load_state_dict(run.module.state_dict())
    empty = resumed.delta("empty", 2)
    resumed.train(1)
    later = resumed.delta("later", 2)
    _chain(resumed, full, later)
    _chain(resumed, full, empty, later)
    # A full dump tells what the state was.
    other = Run(Path(folder, "other"), 0.5)
    other.train(2)
    foreign = other.full("full")
    resumed.module.load_state_dict(run.module.state_dict())
    told = resumed.full("told")
    resumed.train(1)
    _chain(resumed, told, resumed.delta("known", 2))
    _no_chain(resumed.folder, foreign, resumed.folder / "known")
    resumed.module.load_state_dict(run.module.state_dict())
    _refused(lambda: resumed.delta("wrong", early), "has not been in this state", "a state dict of step 2")


def _without_states(rank: int, world_size: int, folder: str) -> None:
    """Loaded without its optimizer state, a checkpoint is not what the table is: no delta follows it."""
    first, second = model("adam", tables=1), model("adam", tables=1)
    features = one_sample({"t0": IDS})
    first(features).backward()
    DynamicEmbDump(f"{folder}/full", first, optim=True)
    DynamicEmbLoad(f"{folder}/full", second)
    second(features).backward()
    _refused(
        lambda: incremental_dump(f"{folder}/delta", second, f"{folder}/full", optim=True), "has not been in this state"
    )
    incremental_dump(f"{folder}/delta", second, 1, optim=True)
    _refused(lambda: merge([f"{folder}/full", f"{folder}/delta"], f"{folder}/merged"), "follows none")


@pytest.mark.parametrize("scenario", [_two_runs, _diverging, _one_run, _from_a_state_dict, _without_states])
def test_lineage_of_models(scenario: Callable[..., None], tmp_path: Path) -> None:
    run_on_ranks(1, scenario, str(tmp_path))


def _record(**fields: Any) -> TableRecord:
    """Of a table without rows, complete but for ``fields``."""
    record = record_of(8, "float32", "sgd", "lru")
    parts = {part.name: PartRecord(0, ()) for part in record.schema.parts}
    return dataclasses.replace(record, **{"parts": parts, **fields})


def test_what_a_table_and_its_checkpoints_remember() -> None:
    full, delta = _record(clock=5, follows=()), _record(clock=9, since=5, follows=())
    elsewhere, other = Ancestor(5, None), Ancestor(4, "f" * 32)
    past = advanced((other, elsewhere), full, "t")
    assert past == (other, ancestor_of(full, "t")), "a full checkpoint tells what the state from elsewhere was"
    assert advanced(past, full, "t") == past, "it is written once more"
    assert advanced((other, elsewhere), delta, "t") == (other, elsewhere, ancestor_of(delta, "t"))
    # What nobody can recognise is named by deltas alone, whose base it may be.
    assert followed((other, elsewhere), full, "t") == ()
    assert followed((other, elsewhere), delta, "t") == (elsewhere,)
    assert [ancestor_of(one, "t").step for one in (full, delta)] == [5, 9]


def test_a_merged_delta_knows_its_past_if_all_that_it_is_made_of_do() -> None:
    deltas = [_record(clock=9, since=5, follows=()), _record(clock=12, since=9, follows=())]
    silent = [dataclasses.replace(one, follows=None) for one in deltas]
    assert merged_history(deltas, "t") == tuple(ancestor_of(one, "t") for one in deltas)
    for chain in ([deltas[0], silent[1]], [silent[0], deltas[1]], silent):
        assert merged_history(chain, "t") is None
    full = _record(clock=5, follows=None)
    assert merged_history([full, *deltas], "t") is not None and merged_history([full, *silent], "t") is None


def test_messages_name_the_latest_ancestors() -> None:
    history = [Ancestor(step, f"{step:032}") for step in range(5)]
    assert described([]) == "none" and described(history[:1]) == f"{0:032} of step 0"
    three = f"{2:032} of step 2, {3:032} of step 3, {4:032} of step 4"
    assert described(history[2:]) == three and described(history) == f"{three} and 2 before"


def test_checkpoints_that_do_not_tell_are_taken_as_before_and_verify_says_so(tmp_path: Path) -> None:
    """Those of earlier versions, which say nothing of what they follow."""
    history, other = History(), History()
    for one, value in ((history, 1), (other, 2)):
        one.step({1: value, 2: value}, set())
    full = history.write(tmp_path / "full")
    for one, value in ((history, 3), (other, 4)):
        one.step({1: value}, set())
    merge([full, other.write(tmp_path / "foreign", 1)], tmp_path / "merged")
    merge([full, history.write(tmp_path / "delta", 1)], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(history.write(tmp_path / "expected"))
    for name in ("full", "delta", "merged"):
        found = verify(tmp_path / name)
        assert not found.findings
        assert found.notes == (
            "model.embeddings/item does not say what came before, and was converted or written by an earlier version: "
            "whether a delta is of its run cannot be told",
        )
