"""Allocations that fail: what the error says, and what is left of the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from dynamicemb.errors import DynamicEmbError, OutOfMemoryError
from dynamicemb.kernels.layout import RowLayout
from dynamicemb.options import DynamicEmbEvictStrategy
from dynamicemb.table import change_log, changes, memory
from dynamicemb.table.filling import TableFilling
from dynamicemb.table.group import TableGroup
from dynamicemb.table.memory import allocating, memory_of
from dynamicemb.table.storage import Chunk
from tests.table.groups import CPU, config, group_of, read, train

LRU, LFU = DynamicEmbEvictStrategy.LRU, DynamicEmbEvictStrategy.LFU
ALLOCATE = Chunk.allocate
#: What torch says of a CPU and of a GPU without room.
FAILURES = (
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
)


@contextmanager
def room_for(slots: int, failure: Exception = FAILURES[0]) -> Iterator[None]:
    """Inside it, no chunk can have more slots."""

    def allocate(wanted: int, layout: RowLayout, device: torch.device) -> Chunk:
        if wanted > slots:
            raise failure
        return ALLOCATE(wanted, layout, device)

    with mock.patch.object(Chunk, "allocate", staticmethod(allocate)):
        yield


def test_it_is_what_a_caller_would_catch() -> None:
    for kind in (DynamicEmbError, RuntimeError, MemoryError):
        assert issubclass(OutOfMemoryError, kind)


@pytest.mark.parametrize("capacity", [2**33, 2**40])
def test_a_table_that_no_machine_holds(capacity: int) -> None:
    """For once a real allocation: it fails at once, whatever the system promises."""
    num_bytes = capacity * (17 + 1024 * 4)
    with pytest.raises(OutOfMemoryError) as caught:
        TableGroup([config("big", capacity, dim=1024)], 1, CPU)
    message = str(caught.value)
    assert message.startswith(f"table 'big': memory for {capacity} rows, {num_bytes} bytes (")
    assert f"on cpu, which has {memory_of(CPU).total / 2**30:.4g} GiB in all and " in message
    assert " GiB free; lower num_embeddings or max_capacity" in message


@pytest.mark.parametrize("failure", FAILURES)
def test_a_table_that_cannot_grow_stays_as_it_was(failure: Exception) -> None:
    group = group_of(config("a"), config("b", capacity=64, init_capacity=8, max_load_factor=1.0))
    train(group, range(6), 1).sum().backward()
    before, progress = group.stored_rows(1), group.progress(1)
    with room_for(0, failure):
        with pytest.raises(OutOfMemoryError, match=r"table 'b': growing by 8 rows, 264 bytes .*keeps its 8 slots"):
            train(group, range(6, 12), 1)
        after = group.stored_rows(1)
        assert torch.equal(after.keys, before.keys) and torch.equal(after.embeddings, before.embeddings)
        assert group.progress(1) == progress and group.storage.geometries[1].slots == 8
        train(group, range(6), 1).sum().backward()  # what fits is trained as before
        assert read(group, [0, 5, 7], 1) == [-2.0, -2.0, 0.0]
    train(group, range(6, 12), 1).sum().backward()  # there is room again
    assert group.storage.geometries[1].slots == 16 and group.progress(1).clock == 3
    assert read(group, [0, 5, 7], 1) == [-2.0, -2.0, -1.0]


def test_a_second_doubling_that_fails_keeps_the_first() -> None:
    """Rows have moved, and the update of an earlier lookup finds them."""
    group = group_of(config(capacity=64, init_capacity=8, max_load_factor=1.0))
    first = train(group, range(8))
    with room_for(8), pytest.raises(OutOfMemoryError, match="growing by 16 rows"):
        train(group, range(8, 34))
    assert group.storage.geometries[0].slots == 16
    assert sorted(group.stored_rows(0).keys.tolist()) == list(range(8))
    first.sum().backward()
    assert read(group, range(8)) == [-1.0] * 8


@pytest.mark.parametrize(("strategy", "log"), [(LRU, "EvictionLog"), (LFU, "EvictionLog"), (LFU, "TouchLog")])
def test_no_room_for_notes_of_changes_changes_nothing(strategy: DynamicEmbEvictStrategy, log: str) -> None:
    """The first lookup after ``begin`` takes their memory, and if it cannot, the next one does."""
    group = group_of(config(evict_strategy=strategy))
    train(group, range(6))
    group.changes.begin()
    before, progress = group.stored_rows(0), group.progress(0)
    with mock.patch.object(changes, log, side_effect=FAILURES[0]), pytest.raises(RuntimeError, match="can't allocate"):
        train(group, range(10))
    after = group.stored_rows(0)
    assert torch.equal(after.keys, before.keys) and torch.equal(after.scores, before.scores)
    assert group.progress(0) == progress and group.counters()[0].size == 6
    train(group, range(4, 10))
    group.changes.begin()
    touched = group.changes.touched(0, progress.clock + (strategy is LRU), 0)
    assert group.changes.first_step(0) == progress.clock and group.changes.survey(0, touched).selected == 6


def test_an_update_finds_rows_that_have_moved_although_changes_could_not_be_noted() -> None:
    group = group_of(config(capacity=64, init_capacity=8, max_load_factor=1.0, evict_strategy=LFU))
    group.changes.begin()
    first = train(group, range(8))
    with mock.patch.object(change_log.TouchLog, "grow", side_effect=FAILURES[0]), pytest.raises(RuntimeError):
        train(group, range(8, 14))
    assert group.storage.geometries[0].slots == 16
    first.sum().backward()
    assert read(group, range(8)) == [-1.0] * 8


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else") as caught, allocating("a table", 1, CPU, "buy memory"):
        raise RuntimeError("something else")
    assert not isinstance(caught.value, OutOfMemoryError)


def test_no_room_for_what_is_loaded_leaves_an_empty_table() -> None:
    group = group_of(config("item", capacity=64))
    train(group, range(30))
    with room_for(32), pytest.raises(OutOfMemoryError, match=r"'item': memory for 64 rows.* the table is empty now"):
        TableFilling(group, 0, 60)
    assert group.stored_rows(0).keys.numel() == 0 and group.counters()[0].size == 0
    train(group, range(5))
    assert sorted(group.stored_rows(0).keys.tolist()) == [0, 1, 2, 3, 4] and group.counters()[0].size == 5


def test_no_room_for_a_reset_leaves_an_empty_table() -> None:
    group = group_of(config("item", capacity=64))
    train(group, range(30))
    with room_for(32), pytest.raises(OutOfMemoryError, match="the table is empty now"):
        group.reset(0)
    assert (group.counters()[0].size, group.progress(0).clock) == (0, 0)
    assert read(group, range(30)) == [0.0] * 30


def test_memory_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP_FILES", ())
    lines = Path("/proc/meminfo").read_text().splitlines()
    machine = memory_of(CPU)
    assert f"MemTotal: {machine.total // 1024} kB" in [" ".join(line.split()) for line in lines]
    assert 0 < machine.free <= machine.total


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The least limit of all groups around the process counts; "max" is none."""
    limit, usage = (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current"))[version - 1]
    own = tmp_path / "cgroup" / "outer" / "inner"
    own.mkdir(parents=True)
    (own / limit).write_text("max\n")
    (own.parent / limit).write_text(f"{2**20}\n")
    for folder in (own, own.parent):
        (folder / usage).write_text(f"{2**18}\n")
    entries = tmp_path / "entries"
    entries.write_text("4:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    unused = (tmp_path / "none", "a", "b")
    files = (tmp_path / "cgroup", limit, usage)
    monkeypatch.setattr(memory, "_CGROUP_FILES", (unused, files) if version == 1 else (files, unused))
    monkeypatch.setattr(memory, "_OWN_CGROUPS", entries)
    assert memory_of(CPU) == memory.Memory(2**20, 2**20 - 2**18)
