"""One group of tables in two memories, one for each engine. Every operation runs on both; every byte is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.fill import FillMode, fill
from dynamicemb.kernels.find import find
from dynamicemb.kernels.gather import gather
from dynamicemb.kernels.insert import Insertion, insert
from dynamicemb.kernels.layout import OptimizerKind, RowLayout, TableGeometry
from dynamicemb.kernels.update import WeightDecayMode, update
from dynamicemb.kernels.views import AddressRow, InitializerView, KeyStatus, Scores, UniqueKeys
from tests.kernels.memory import Chunk, GroupMemory
from tests.kernels.triton_host import DEVICE, engine
from tests.tolerances import ENGINE_ROWWISE_ATOL, ENGINE_ROWWISE_RTOL

__all__ = ["Batch", "Twins", "assert_same_unique", "both_engines", "initializers", "on_device"]

Result = TypeVar("Result")


def on_device(value: Any) -> Any:
    """A tensor, or a view made of tensors, where the Triton engine works."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, copy=True)
    if isinstance(value, (UniqueKeys, InitializerView)):
        fields = {field.name: on_device(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def both_engines(function: Callable[..., Result], *arguments: Any) -> tuple[Result, Result]:
    """What ``function`` returns from the CPU engine, and from the Triton engine on copies of the same arguments."""
    copies = [on_device(argument) for argument in arguments]
    with engine("cpu"):
        expected = function(*arguments)
    with engine("triton"):
        return expected, function(*copies)


def assert_same_unique(expected: UniqueKeys, actual: UniqueKeys) -> None:
    """Every valid entry is equal."""
    count = expected.keys.numel()
    assert actual.count.tolist() == expected.count.tolist() == [count]
    assert torch.equal(actual.keys[:count].cpu(), expected.keys)
    assert torch.equal(actual.tables[:count].cpu(), expected.tables)
    assert torch.equal(actual.inverse.cpu(), expected.inverse)
    assert torch.equal(actual.order.cpu(), expected.order)
    assert torch.equal(actual.offsets[: count + 1].cpu(), expected.offsets)


_PARAMETERS = {
    FillMode.UNIFORM: (-0.25, 0.75, 0.0, 0.0),
    FillMode.NORMAL: (0.125, 2.0, 0.0, 0.0),
    FillMode.TRUNCATED_NORMAL: (0.5, 0.3, 0.0227501319481792, 0.9772498680518208),
    FillMode.CONSTANT: (0.3, 0.0, 0.0, 0.0),
    FillMode.DEBUG: (0.0, 0.0, 0.0, 0.0),
}


def initializers(tables: int, modes: Sequence[FillMode] = tuple(_PARAMETERS)) -> InitializerView:
    """One initializer for each table; the modes go round, so that one group has all of them."""
    chosen = [modes[table % len(modes)] for table in range(tables)]
    return InitializerView(
        seeds=torch.tensor([(-1) ** table * (0x1234_5678_9ABC_DEF0 + table) for table in range(tables)]),
        modes=torch.tensor([int(mode) for mode in chosen], dtype=torch.int32),
        parameters=torch.tensor([_PARAMETERS[mode] for mode in chosen], dtype=torch.float64),
        states=torch.tensor([0.5 + table for table in range(tables)], dtype=torch.float32),
        any_normal=FillMode.NORMAL in chosen or FillMode.TRUNCATED_NORMAL in chosen,
    )


@dataclass
class Batch:
    """Distinct keys and their slots, from both engines; the Triton engine's have the length of the batch."""

    cpu: UniqueKeys
    triton: UniqueKeys
    cpu_slots: torch.Tensor
    triton_slots: torch.Tensor

    @property
    def count(self) -> int:
        return self.cpu.keys.numel()

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Values of distinct keys as the Triton engine takes them: something wrong past the last valid one."""
        out = torch.full(self.triton.keys.shape, -1, dtype=values.dtype)
        out[: self.count] = values
        return out.to(DEVICE)


class Twins:
    """The state of ``T`` tables, twice. Keys handed in must belong to one rank of ``world_size``."""

    def __init__(self, geometries: Sequence[TableGeometry], layout: RowLayout, world_size: int = 1) -> None:
        self.cpu = GroupMemory(geometries, layout, world_size)
        self.triton = GroupMemory(geometries, layout, world_size, DEVICE)
        self.layout = layout
        self.initializers = initializers(len(geometries))

    def lookup(
        self, keys: torch.Tensor, tables: torch.Tensor, scores: Optional[torch.Tensor] = None, accumulate: bool = False
    ) -> Batch:
        """dedup and find. ``scores``: int64, for the distinct keys in their order, repeated as often as needed."""
        count, world_size = len(self.cpu.geometries), self.cpu.view.world_size
        expected, actual = both_engines(dedup, keys, tables, count, world_size)
        assert_same_unique(expected, actual)
        batch = Batch(expected, actual, expected.keys, actual.keys)
        given = None if scores is None else Scores(self._scores(batch, scores))
        with engine("cpu"):
            batch.cpu_slots = find(self.cpu.view, expected, given, accumulate)
        with engine("triton"):
            padded = None if given is None else Scores(batch.padded(given.numbers))
            batch.triton_slots = find(self.triton.view, actual, padded, accumulate)
        self._compare_slots(batch)
        self.compare()
        return batch

    def train(
        self, keys: torch.Tensor, tables: torch.Tensor, scores: torch.Tensor, accumulate: bool = False
    ) -> tuple[Batch, Insertion]:
        """A training lookup: dedup, find, insert, fill, gather."""
        batch = self.lookup(keys, tables, scores, accumulate)
        given = self._scores(batch, scores)
        with engine("cpu"):
            expected = insert(self.cpu.view, batch.cpu, batch.cpu_slots, Scores(given))
            fill(self.cpu.view, batch.cpu, batch.cpu_slots, expected.status, self.initializers)
        with engine("triton"):
            actual = insert(self.triton.view, batch.triton, batch.triton_slots, Scores(batch.padded(given)))
            fill(self.triton.view, batch.triton, batch.triton_slots, actual.status, on_device(self.initializers))
        assert torch.equal(actual.status[: batch.count].cpu(), expected.status)
        replaced = expected.status == KeyStatus.REPLACED
        for name in ("evicted_keys", "evicted_scores"):
            values = getattr(actual, name)[: batch.count].cpu()
            assert torch.equal(values[replaced], getattr(expected, name)[replaced]), name
        self._compare_slots(batch)
        self.compare()
        self.gather(batch)
        return batch, expected

    def gather(self, batch: Batch) -> torch.Tensor:
        """The embeddings of a batch, equal to the bit."""
        with engine("cpu"):
            expected = gather(self.cpu.view, batch.cpu_slots, batch.cpu.inverse)
        with engine("triton"):
            actual = gather(self.triton.view, batch.triton_slots, batch.triton.inverse)
        assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))
        return expected

    def update(
        self,
        batch: Batch,
        gradients: torch.Tensor,
        hyperparameters: torch.Tensor,
        steps: torch.Tensor,
        mode: WeightDecayMode = WeightDecayMode.NONE,
    ) -> None:
        """One optimizer step, counted in ``steps``; afterwards both memories hold the CPU engine's rows."""
        on_triton, before = [on_device(number) for number in (gradients, hyperparameters, steps)], steps.clone()
        with engine("cpu"):
            update(self.cpu.view, batch.cpu, batch.cpu_slots, gradients, hyperparameters, steps, mode)
        with engine("triton"):
            update(self.triton.view, batch.triton, batch.triton_slots, *on_triton, mode)
        assert torch.equal(steps, before + 1) and torch.equal(on_triton[2].cpu(), steps)
        if self.layout.optimizer is not OptimizerKind.ROWWISE_ADAGRAD:
            self.compare()  # the same correctly rounded operations in the same order
            return
        for table in range(len(self.cpu.geometries)):
            slots = torch.tensor(sorted(self.cpu.occupied(table)), dtype=torch.int64)
            got, wanted = self.triton.embeddings(slots).float().cpu(), self.cpu.embeddings(slots).float()
            # A value of 16 bits may round to the neighbour: one step of 2**-10 or 2**-7.
            step = 0.0 if self.layout.embedding_dtype is torch.float32 else torch.finfo(self.layout.embedding_dtype).eps
            torch.testing.assert_close(got, wanted, rtol=ENGINE_ROWWISE_RTOL + step, atol=ENGINE_ROWWISE_ATOL)
            got, wanted = self.triton.states(slots).cpu(), self.cpu.states(slots)
            torch.testing.assert_close(got, wanted, rtol=ENGINE_ROWWISE_RTOL, atol=0.0)
        for expected, actual in zip(self._chunks(self.cpu), self._chunks(self.triton)):
            actual.rows.copy_(expected.rows)

    def grow(self, table: int) -> None:
        """Doubles a table."""
        assert self.cpu.geometries[table].can_grow
        with engine("cpu"):
            self.cpu.grow(table)
        with engine("triton"):
            self.triton.grow(table)
        self.compare()

    def compare(self) -> None:
        """Every byte of digests, keys, scores and rows is equal, empty slots included."""
        for number, (expected, actual) in enumerate(zip(self._chunks(self.cpu), self._chunks(self.triton))):
            for kind, wanted, got in zip(AddressRow, expected.parts, actual.parts):
                assert torch.equal(got.cpu(), wanted), f"{kind.name} of chunk {number}"

    @staticmethod
    def _chunks(memory: GroupMemory) -> list[Chunk]:
        return [chunk for chunks in memory.chunks for chunk in chunks]

    @staticmethod
    def _compare_slots(batch: Batch) -> None:
        assert torch.equal(batch.triton_slots[: batch.count].cpu(), batch.cpu_slots)

    @staticmethod
    def _scores(batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        return scores.repeat(-(-batch.count // scores.numel()))[: batch.count].contiguous()
