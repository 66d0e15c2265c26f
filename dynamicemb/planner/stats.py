"""The printed plan: torchrec's, and below it where the memory of the dynamic tables goes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import ShardingOption

from dynamicemb.kernels.layout import TableGeometry
from dynamicemb.planner.enumerator import DynamicEmbeddingEnumerator
from dynamicemb.planner.tables import DynamicTable

__all__ = ["DynamicEmbeddingStats", "dynamic_table_rows", "format_bytes"]

# Torchrec's, so that whoever shows its printed plan sees the whole of it.
logger = logging.getLogger(EmbeddingStats.__module__)

_HEADER = (
    "Table",
    "Rows/rank",
    "Rows at start",
    "Dim",
    "Dtype",
    "Optimizer",
    "Keys+scores",
    "Rows+state",
    "Total/rank",
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class DynamicEmbeddingStats(EmbeddingStats):
    """TorchRec's statistics, and with ``debug`` a table of the dynamic tables and their memory on each rank."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Print the plan. Arguments are those of :meth:`EmbeddingStats.log`; the planner passes all by keyword."""
        super().log(*args, **kwargs)
        enumerator = kwargs.get("enumerator")
        if not kwargs.get("debug", True) or not isinstance(enumerator, DynamicEmbeddingEnumerator):
            return
        plan: Sequence[ShardingOption] = kwargs.get("best_plan", ())
        tables = [enumerator.dynamic_tables.get((option.path, option.name)) for option in plan]
        for row in dynamic_table_rows([table for table in tables if table is not None]):
            logger.info(row)


def dynamic_table_rows(tables: Iterable[DynamicTable]) -> list[str]:
    """Lines of text, one for each of ``tables`` and a header; no line for no table."""
    cells = [_cells(table) for table in tables]
    if not cells:
        return []
    widths = [max(len(row[column]) for row in (_HEADER, *cells)) for column in range(len(_HEADER))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in (_HEADER, *cells)]
    title = " Dynamic Tables (memory on each rank, without input and output buffers) "
    width = max(len(lines[0]), len(title)) + 4
    return [title.center(width, "#"), *(f"# {line.ljust(width - 4)} #" for line in lines), "#" * width]


def _cells(table: DynamicTable) -> tuple[str, ...]:
    initial_rows = table.options.init_capacity or table.slots
    start = TableGeometry.create(table.slots, initial_rows, table.options.bucket_capacity)
    return (
        table.fqn,
        str(table.slots),
        str(start.slots),
        str(table.layout.dim),
        str(table.layout.embedding_dtype).removeprefix("torch."),
        table.layout.optimizer.name.lower(),
        format_bytes(table.metadata_bytes),
        format_bytes(table.row_bytes),
        format_bytes(table.total_bytes),
    )


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` in the largest binary unit that leaves one digit before the point."""
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.4g} {_UNITS[-1]}"
