"""Topic: find, find_or_insert and insert_and_evict on large tables, beside the published numbers of HierarchicalKV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from figures import CheckError, Target

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, table_bytes
from dynamicemb.kernels.views import UniqueKeys
from gpu import traffic
from gpu.device import GIB
from gpu.full_table import KEYS_PER_SLOT, FullTable
from gpu.published import TABLE_SOURCE, hierarchical_kv
from gpu.rounds import timed
from gpu.tables import BUCKET_CAPACITY
from gpu.topic import Case, Context, Measured, Topic
from gpu.traffic import Traffic

__all__ = ["DRY", "FULL", "Size", "topic"]

FIND_TARGET = Target(7.0, at_least=True)
EVICT_TARGET = Target(1.5, at_least=True)
#: Load that a table may be away from the one it was filled to.
LOAD_TOLERANCE = 0.01
CHECKED_ROWS = 4096


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        slots: numbers of slots; the targets are for the largest.
        dims: columns.
        loads: ascending.
        batch: distinct keys of a batch.
        step_keys: inserted at once while filling.
        batches: that take turns.
        samples: of each figure.
    """

    slots: tuple[int, ...]
    dims: tuple[int, ...]
    loads: tuple[float, ...]
    batch: int
    step_keys: int
    batches: int
    samples: int


FULL = Size((1 << 27, 1 << 26), (64, 128, 32, 8), (0.5, 0.75, 1.0), 1 << 20, 1 << 22, batches=8, samples=12)
DRY = Size((1 << 12,), (8,), (0.5, 1.0), 64, 512, batches=2, samples=2)


@dataclass(frozen=True)
class Keys:
    """Batches for one load: keys that are there with their slots, half of them absent, all absent."""

    there: list[torch.Tensor]
    there_slots: list[torch.Tensor]
    distinct: list[UniqueKeys]
    half: list[UniqueKeys]
    absent: list[UniqueKeys]

    @staticmethod
    def of(table: FullTable, size: Size) -> Keys:
        there = [table.present(size.batch) for _ in range(size.batches)]
        some = [table.present(size.batch // 2)[0] for _ in range(size.batches)]
        return Keys(
            there=[keys for keys, _ in there],
            there_slots=[slots for _, slots in there],
            distinct=[table.distinct(keys) for keys, _ in there],
            half=[table.distinct(torch.cat([keys, table.fresh(size.batch - keys.numel())])) for keys in some],
            absent=[table.distinct(table.fresh(size.batch)) for _ in range(size.batches)],
        )


def _check(table: FullTable, keys: Keys, load: float) -> None:
    """Compares slots with those the keys were taken from, and what is stored with what was inserted.

    Raises:
        CheckError: a key was found elsewhere, or where it should not be, or not at all.
    """
    if abs(table.load - load) > LOAD_TOLERANCE:
        raise CheckError(f"the load is {table.load:.3f} instead of {load}")
    view, chunk = table.storage.view, table.chunk
    slots = find(view, table.in_any_order(keys.there[0]))
    if not torch.equal(slots, keys.there_slots[0]):
        raise CheckError("a key was not found in the slot it is in")
    if not torch.equal(find(view, keys.distinct[0]), slots[keys.distinct[0].order]):
        raise CheckError("a key was found elsewhere after dedup")
    some = slots[:CHECKED_ROWS]
    if not torch.equal(gather(view, some), chunk.rows[some].view(torch.float32)):
        raise CheckError("a gathered row differs from the one in its slot")
    if bool((find(view, keys.absent[0]) >= 0).any()):
        raise CheckError("a key was found that is not in the table")
    for batch in (keys.half[0], keys.absent[0]):
        placed = table.find_or_insert(batch, table.scores())
        if bool((placed < 0).any()) or not torch.equal(chunk.keys[placed], batch.keys):
            raise CheckError("an inserted key is not in the slot it was given")
        table.restore()


def _operations(
    table: FullTable, keys: Keys, load: float, batch: int
) -> list[tuple[str, Callable[[int], object], Traffic, Optional[Target], bool]]:
    """Name, function, traffic, target, and whether the table changes, of everything measured at one load."""
    view, buckets, layout, count = table.storage.view, table.buckets, table.storage.layout, len(keys.there)
    unordered = [table.in_any_order(batch_keys) for batch_keys in keys.there]
    half_scores = [table.scores() for _ in keys.half]
    absent_scores = [table.scores() for _ in keys.absent]
    lines = traffic.touched_buckets(batch, buckets)
    evicted = 1.0 if load == 1 else 0.0
    find_all = traffic.find(batch, batch, load)
    half, all_new = batch / 2, float(batch)
    insert_half = traffic.find(batch, half, load, touched=lines, touch=True)
    insert_half += traffic.insert(batch, half, buckets, evicted * half)
    insert_all = traffic.find(batch, 0, load, touched=lines, touch=True)
    insert_all += traffic.insert(batch, all_new, buckets, all_new)
    rows_out = traffic.gather(batch, batch, layout, through_inverse=False)

    def with_rows(index: int) -> object:
        slots = table.find_or_insert(keys.half[index % count], half_scores[index % count], rows=True)
        return gather(view, slots)

    operations: list[tuple[str, Callable[[int], object], Traffic, Optional[Target], bool]] = [
        ("find", lambda index: find(view, unordered[index % count]), find_all, FIND_TARGET, False),
        (
            "find, after dedup", lambda index: find(view, keys.distinct[index % count]),
            traffic.find(batch, batch, load, touched=lines), FIND_TARGET, False,
        ),
        (
            "find, rows", lambda index: gather(view, find(view, unordered[index % count])), find_all + rows_out, None,
            False,
        ),
        (
            "find_or_insert",
            lambda index: table.find_or_insert(keys.half[index % count], half_scores[index % count]),
            insert_half, None, True,
        ),
        (
            "find_or_insert, rows", with_rows, insert_half + traffic.fill(batch, half, layout) + rows_out, None, True,
        ),
    ]  # fmt: skip
    if load == 1:
        operations += [
            (
                "insert_and_evict",
                lambda index: table.find_or_insert(keys.absent[index % count], absent_scores[index % count]),
                insert_all, EVICT_TARGET, True,
            ),
            (
                "insert_and_evict, rows",
                lambda index: table.find_or_insert(keys.absent[index % count], absent_scores[index % count], rows=True),
                insert_all + traffic.fill(batch, all_new, layout), None, True,
            ),
        ]  # fmt: skip
    return operations


def _measure(context: Context, size: Size, slots: int, dim: int) -> Measured:
    table, measured = FullTable(slots, dim, size.step_keys, context.torch_device), Measured()
    for load in size.loads:
        table.fill_to(load)
        table.save()
        keys = Keys.of(table, size)
        _check(table, keys, load)
        for operation, function, work, target, changes in _operations(table, keys, load, size.batch):
            # Operations that change the table begin from the same one each time.
            seconds = timed(context.device, function, size.samples, before=table.restore if changes else None)
            name = f"{_slots(slots)} slots, dim {dim}, load {load:g}: {operation}"
            measured.figures.append(
                context.rate_figure(
                    name, size.batch, seconds, work, f"{1e6 * sum(seconds) / len(seconds):,.0f} µs on average",
                    array_bytes=table.storage.num_bytes if "rows" in operation else table.metadata_bytes,
                    target=target if slots == max(size.slots) else None,
                    published=hierarchical_kv(operation, dim, load),
                )
            )  # fmt: skip
            measured.series[f"{name}, s"] = seconds
    return measured


def _measure_dedup(context: Context, size: Size) -> Measured:
    """What comes before each of the others but the finds in any order."""
    batches = [
        torch.randint(-(2**63), 2**63 - 1, (size.batch,), device=context.torch_device) for _ in range(size.batches)
    ]
    tables = torch.zeros(size.batch, dtype=torch.int32, device=context.torch_device)

    def run(index: int) -> object:
        return dedup(batches[index % size.batches], tables, 1, 1)

    seconds = timed(context.device, run, size.samples, repetitions=4)
    work = traffic.dedup(size.batch, size.batch)
    figure = context.rate_figure(
        f"dedup of {size.batch:,} keys", size.batch, seconds, work, "one sort of 32-bit prefixes"
    )
    return Measured([figure], {"dedup, s": seconds})


def _slots(slots: int) -> str:
    return f"{slots >> 20}M" if slots >= 1 << 20 else f"{slots:,}"


def _memory_bytes(size: Size, slots: int, dim: int) -> int:
    """The table, what is saved of it, batches, and what filling takes."""
    table = table_bytes(slots, BUCKET_CAPACITY, RowLayout(dim, torch.float32, OptimizerKind.SGD))
    return table + 17 * slots + size.batches * size.batch * 300 + size.step_keys * 200 + 3 * size.batch * dim * 4


def topic(context: Context) -> Topic:
    """One case for each number of slots and dim."""
    size = DRY if context.dry else FULL
    cases = [Case("dedup", lambda deadline: _measure_dedup(context, size), 3)]
    for slots in size.slots:
        for dim in size.dims:

            def run(deadline: float, slots: int = slots, dim: int = dim) -> Measured:
                return _measure(context, size, slots, dim)

            cases.append(Case(f"{_slots(slots)} slots, dim {dim}", run, 10, _memory_bytes(size, slots, dim)))
    largest = RowLayout(max(size.dims), torch.float32, OptimizerKind.SGD)
    return Topic(
        name="table",
        title="Operations of one large table, in billions of keys a second",
        setup=(
            f"Batches of {size.batch:,} distinct keys, {size.batches} in rotation; float32 rows without optimizer "
            "state, in device memory; up to "
            f"{table_bytes(max(size.slots), BUCKET_CAPACITY, largest) / GIB:.1f} GiB a table. "
            f"A load of 1 means {KEYS_PER_SLOT:g} keys inserted for each slot, so that every bucket is full. find: "
            "keys that are there, in no order, or as dedup orders them. find_or_insert: half of the keys are absent. "
            "insert_and_evict: all are, and each evicts another. These come after dedup, whose time stands in the "
            "first line, and start from the same table each time. With rows: found rows are copied out, inserted ones "
            f"get their first values. {TABLE_SOURCE}"
        ),
        check=(
            "Keys taken from slots are found in those slots, absent ones nowhere; inserted ones are in the slots they "
            "were given; gathered rows equal those in the table."
        ),
        cases=cases,
    )
