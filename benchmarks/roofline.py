"""What each kernel should take on a GPU that nobody has measured yet, from its bytes and the limits of the memory.

    python benchmarks/roofline.py            print the tables of docs/performance.md
    python benchmarks/roofline.py --write    put them there

Measured times come from the newest results of the topic ``breakdown``, where there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from gpu import traffic
from gpu.sides import WITH_INITIALIZER
from gpu.tables import BUCKET_CAPACITY, LOAD
from gpu.traffic import Traffic

from dynamicemb.kernels.layout import OptimizerKind, RowLayout

__all__ = ["H200", "Device", "Row", "document", "evaluation_rows", "measured_microseconds", "step_rows"]

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- begin: python benchmarks/roofline.py --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Device:
    """Limits of a GPU.

    Attributes:
        name: of the GPU.
        copy_bytes_per_second: read plus written by a copy from device to device.
        random_reads_per_second: reads of up to 64 bytes at random places.
        sort_pass_seconds: one pass of a radix sort of a million pairs, which is too short to be limited by memory.
        launch_seconds: from the end of one kernel to the work of the next one.
    """

    name: str
    copy_bytes_per_second: float
    random_reads_per_second: float
    sort_pass_seconds: float
    launch_seconds: float

    def seconds(self, work: Traffic) -> float:
        """Least time of one kernel."""
        streamed, seconds = work.streamed_bytes, self.launch_seconds
        for width, count in work.accesses.items():
            if width <= 64:
                seconds += count / self.random_reads_per_second
            else:
                streamed += width * count
        seconds += sum(sort.key_bytes * 8 // traffic.RADIX_BITS for sort in work.sorts) * self.sort_pass_seconds
        return seconds + streamed / self.copy_bytes_per_second


_NAMES = {OptimizerKind.SGD: "SGD", OptimizerKind.ADAM: "Adam"}
H200 = Device("H200", 4.3e12, 46e9, 20e-6, 2e-6)

# The step that NVIDIA published for its dynamicemb and fbgemm's tables, and that `make bench-gpu` measures.
IDS, UNIQUE, TABLES, DIM, ROWS_PER_TABLE = 1_048_570, 350_000, 10, 128, 1_680_000
BUCKETS = TABLES * ROWS_PER_TABLE / LOAD / BUCKET_CAPACITY


@dataclass(frozen=True)
class Row:
    """A kernel in the table.

    Attributes:
        operation: what it does.
        kernel: its name in the results of ``breakdown``.
        work: what it moves.
    """

    operation: str
    kernel: str
    work: Traffic


def step_rows(kind: OptimizerKind) -> list[Row]:
    """The kernels of a training step of ten tables in which every id is in its table."""
    layout = RowLayout(DIM, torch.float32, kind)
    lines = traffic.touched_buckets(UNIQUE, BUCKETS)
    return [
        Row("dedup: prefixes", "_prefix_kernel", traffic.dedup_prefix(IDS)),
        Row("dedup: sort of prefixes", "sorting (cub)", traffic.sort(IDS, key_bytes=traffic.PREFIX_BYTES)),
        Row("dedup: compare neighbours", "_compare_kernel", traffic.dedup_compare(IDS)),
        Row("dedup: settle, nothing to do", "_settle_kernel", Traffic()),
        Row("dedup: number entries", "_number_kernel", traffic.dedup_number(IDS, UNIQUE)),
        Row("find, scores set", "_find_kernel", traffic.find(UNIQUE, UNIQUE, LOAD, touched=lines, touch=True)),
        Row("insert, nothing absent", "_insert_kernel", traffic.insert(UNIQUE, 0, BUCKETS)),
        Row("fill, nothing new", "_fill_kernel", traffic.fill(UNIQUE, 0, layout)),
        Row("tally", "_tally_kernel", traffic.tally(UNIQUE, TABLES)),
        Row("gather", "_gather_kernel", traffic.gather(IDS, UNIQUE, layout)),
        Row("step counted, whole blocks summed", "_begin_update_kernel", traffic.begin_update(IDS)),
        Row("update, sums included", "_update_kernel", traffic.update(IDS, UNIQUE, layout)),
    ]


def evaluation_rows() -> list[Row]:
    """The kernels of an evaluation of the same ids. The last one runs where a table has an evaluation initializer."""
    layout = RowLayout(DIM, torch.float32, OptimizerKind.SGD)
    return [
        Row("find", "_find_kernel", traffic.find_repeated(IDS, UNIQUE, LOAD)),
        Row("gather", "_gather_kernel", traffic.gather(IDS, UNIQUE, layout, through_inverse=False)),
        Row("missing rows, none missing", "_fill_missing_kernel", traffic.fill_missing(IDS, 0, layout)),
    ]


def static_seconds(device: Device, kind: OptimizerKind) -> float:
    """The same step of static tables: rows out, and a sort and the update on the way back."""
    layout = RowLayout(DIM, torch.float32, kind)
    parts = traffic.static_forward(IDS, UNIQUE, layout), traffic.static_backward(IDS, UNIQUE, layout)
    return sum(device.seconds(part) for part in parts)


def measured_microseconds(kind: OptimizerKind, results: Path, what: str = "dynamic step") -> Mapping[str, float]:
    """Median of each kernel of a step or an evaluation, by name, from the newest ``breakdown``; empty without one."""
    files = sorted(results.glob("breakdown-*.json"), key=lambda file: file.stem[-10:])
    if not files:
        return {}
    prefix = f"{_NAMES[kind]}, {what}: "
    found = {}
    for findings in json.loads(files[-1].read_text())["findings"]:
        for figure in findings["figures"]:
            if figure["name"].startswith(prefix) and figure["unit"] == "µs":
                found[figure["name"].removeprefix(prefix)] = float(figure["measured"]["median"])
    return found


def _table(
    device: Device, title: str, rows: Sequence[Row], measured: Mapping[str, float], sums: Mapping[str, int]
) -> list[str]:
    """A line for each of ``rows``; after the first ``sums[name]`` of them one with their sum, under that name."""
    lines = [
        f"{title}, {device.name}:",
        "",
        "| kernel | MB moved | random accesses | predicted µs | measured µs | measured / predicted |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    total = 0.0
    for number, row in enumerate(rows, 1):
        seconds, accesses = device.seconds(row.work), sum(row.work.accesses.values())
        total += seconds
        found: Optional[float] = measured.get(row.kernel)
        cells = ("not measured yet", "") if found is None else (f"{found:.0f}", f"{1e-6 * found / seconds:.2f}")
        lines.append(
            f"| {row.operation} | {row.work.num_bytes / 1e6:.0f} | {accesses / 1e6:.2f} M | {1e6 * seconds:.0f} | "
            f"{cells[0]} | {cells[1]} |"
        )
        lines += [f"| **{name}** | | | **{1e6 * total:.0f}** | | |" for name, count in sums.items() if count == number]
    return [*lines, ""]


def _step_table(device: Device, kind: OptimizerKind, results: Path) -> list[str]:
    rows, measured = step_rows(kind), measured_microseconds(kind, results)
    static = 1e6 * static_seconds(device, kind)
    lines = _table(device, _NAMES[kind], rows, measured, {"step": len(rows)})
    return [*lines, f"The same step of static tables, predicted alike: {static:.0f} µs.", ""]


def _evaluation_table(device: Device, results: Path) -> list[str]:
    measured = measured_microseconds(OptimizerKind.SGD, results, f"{WITH_INITIALIZER}, evaluation")
    sums = {"absent ids read as zeros": 2, "absent ids read as an initializer says": 3}
    return _table(device, "Evaluation", evaluation_rows(), measured, sums)


def document(device: Device = H200, results: Path = HERE / "results") -> str:
    """The tables, as they stand in docs/performance.md."""
    lines: list[str] = []
    for kind in (OptimizerKind.SGD, OptimizerKind.ADAM):
        lines += _step_table(device, kind, results)
    lines += _evaluation_table(device, results)
    return "\n".join(lines).rstrip() + "\n"


def rewritten(page: str) -> str:
    """``page`` with the tables of today between its marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{document()}\n{END}{tail}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(rewritten(PAGE.read_text()))
    else:
        print(document())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
