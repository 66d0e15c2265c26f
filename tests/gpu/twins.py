"""A group of tables on the CPU engine and the same one on the engine under test, asked the same things."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamicemb.kernels.dedup import dedup
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.outgoing import count_runs, with_occurrences
from dynamicemb.kernels.segment_sum import segment_sum
from dynamicemb.table.function import expand, lookup
from dynamicemb.table.group import TableGroup
from tests.gpu.batches import Batch
from tests.gpu.cases import Case
from tests.gpu.memory import assert_close_groups, assert_equal_groups, assert_same_bits
from tests.gpu.scale import CPU, Scale

__all__ = ["Twins", "look_up"]


def look_up(group: TableGroup, batch: Batch) -> torch.Tensor:
    """Rows of a training lookup, float32 [N, dim]; their backward pass is the update."""
    batch = batch.to(group.device)
    anchor = torch.empty(0, device=group.device, requires_grad=True)
    return lookup(group, anchor, batch.keys, batch.tables, batch.counts, training=True)


#: What :meth:`Twins.exchange` compares.
EXCHANGED = ("keys of each run", "keys and occurrences", "expanded rows", "sums of rows")


@dataclass(frozen=True)
class Pending:
    """A training lookup whose gradients have not come yet."""

    expected: torch.Tensor
    actual: torch.Tensor


class Twins:
    """Every lookup compares the rows that both return, :meth:`compare` all that both hold."""

    def __init__(self, case: Case, scale: Scale) -> None:
        self._scale = scale
        self._rowwise = case.optimizer is OptimizerKind.ROWWISE_ADAGRAD
        self._generator = torch.Generator(scale.device).manual_seed(case.rows)
        self.expected = TableGroup(case.configs(), case.world_size, CPU)
        with scale.engine():
            self.actual = TableGroup(case.configs(), case.world_size, scale.device)

    def train(self, batch: Batch) -> None:
        self.update(self.lookup(batch))

    def lookup(self, batch: Batch) -> Pending:
        expected = look_up(self.expected, batch)
        with self._scale.engine():
            actual = look_up(self.actual, batch)
        assert_same_bits(expected.detach(), actual.detach(), "rows of a training lookup")
        return Pending(expected, actual)

    def update(self, pending: Pending) -> None:
        """Gradients of order one, normally distributed."""
        shape, device = pending.actual.shape, self._scale.device
        gradients = torch.randn(shape, generator=self._generator, device=device)
        pending.expected.backward(gradients.cpu())
        with self._scale.engine():
            pending.actual.backward(gradients)
        if self._rowwise:  # at once, before another lookup shows the difference
            self.compare("after an update")

    def evaluate(self, batch: Batch) -> torch.Tensor:
        expected = self.expected.eval_lookup(batch.keys, batch.tables)
        with self._scale.engine():
            there = batch.to(self._scale.device)
            actual = self.actual.eval_lookup(there.keys, there.tables)
        assert_same_bits(expected, actual, "rows of an evaluation lookup")
        return expected

    def exchange(self, batch: Batch) -> None:
        """What ranks do with keys that they send, with rows of distinct keys, and with gradients on their way back."""
        layout = self.expected.storage.layout
        rows = torch.randn(batch.keys.numel(), layout.dim, generator=torch.Generator().manual_seed(len(batch.keys)))
        expected = self._exchanged(batch, self.expected, rows)
        with self._scale.engine():
            actual = self._exchanged(batch.to(self._scale.device), self.actual, rows.to(self._scale.device))
        for wanted, got, what in zip(expected, actual, EXCHANGED, strict=True):
            assert_same_bits(wanted, got, what)

    @staticmethod
    def _exchanged(batch: Batch, group: TableGroup, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tables = len(group.configs)
        unique = dedup(batch.keys, batch.tables, tables, group.world_size)
        lengths = torch.empty(group.world_size, tables, dtype=torch.int64, device=rows.device)
        count_runs(unique, lengths)
        expanded = expand(rows.to(group.storage.layout.embedding_dtype), unique)
        count = int(unique.count)
        return lengths, with_occurrences(unique)[:count], expanded, segment_sum(rows, unique)[:count]

    def set_scores(self, score: int) -> None:
        """What CUSTOMIZED gives to the keys of the lookups that follow."""
        for group in (self.expected, self.actual):
            group.custom_scores.copy_(torch.arange(score, score + len(group.configs)))

    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        for group in (self.expected, self.actual):
            group.set_learning_rate(table, learning_rate)

    def compare(self, what: str) -> None:
        (assert_close_groups if self._rowwise else assert_equal_groups)(self.expected, self.actual, what)

    def compare_stored_rows(self) -> None:
        """The copy of each table in canonical order."""
        for table in range(len(self.expected.configs)):
            expected = self.expected.stored_rows(table)
            with self._scale.engine():
                actual = self.actual.stored_rows(table)
            for name in ("keys", "slots", "scores"):
                assert_same_bits(getattr(expected, name), getattr(actual, name), f"stored {name} of table {table}")
            bits = [rows.embeddings.view(torch.uint8) for rows in (expected, actual)]
            assert_same_bits(bits[0], bits[1], f"stored embeddings of table {table}")
            for name, state in expected.states.items():
                assert_same_bits(state, actual.states[name], f"stored {name} of table {table}")
