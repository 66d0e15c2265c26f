"""What a step should take on a GPU: predicted kernel by kernel, beside what others published and what was measured.

    python benchmarks/roofline.py            print the tables of docs/performance.md
    python benchmarks/roofline.py --write    put them there

Predictions take the machine code from the newest results of ``make aot``. Measured times come from the newest results
of the topics ``step`` (whole phases) and ``breakdown`` (kernels), where there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from gpu import traffic
from gpu.prediction import H100, H200, Chain, Compiled, Device, Prediction, compiled
from gpu.published import NAMES, step_milliseconds
from gpu.sides import WITH_INITIALIZER
from gpu.tables import BUCKET_CAPACITY, LOAD
from gpu.traffic import Traffic

from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.kernels.rows_triton import DTYPE_CODES
from dynamicemb.table.optimizers import OptimizerConfig

__all__ = ["SECTIONS", "Measured", "Row", "document", "measured_kernels", "measured_phases", "phase_rows"]

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
RESULTS = HERE / "results"
BEGIN, END = "<!-- begin: {section}, by python benchmarks/roofline.py --write -->", "<!-- end: {section} -->"
NOT_MEASURED = "not measured yet"
KINDS = (OptimizerKind.SGD, OptimizerKind.ADAM)
#: What comes on top of an evaluation where absent ids do not read as zeros.
INITIALIZER = "evaluation, with an initializer"
PHASES = ("forward", "backward", "step", "evaluation", INITIALIZER)
#: Of phases that consist of others.
PARTS = {"step": ("forward", "backward"), INITIALIZER: ("evaluation", INITIALIZER)}

# The step that NVIDIA published for its dynamicemb and fbgemm's tables, and that `make bench-gpu` measures.
IDS, UNIQUE, TABLES, DIM, ROWS_PER_TABLE = 1_048_570, 350_000, 10, 128, 1_680_000
BUCKETS = TABLES * ROWS_PER_TABLE / LOAD / BUCKET_CAPACITY


@dataclass(frozen=True)
class Row:
    """A kernel in the table.

    Attributes:
        phase: of the step that it belongs to, one of ``PHASES``.
        operation: what it does.
        kernel: its name, in the results of ``breakdown`` and in those of ``make aot``.
        work: what it moves.
        chain: what its warps wait for; None where the kernel is not ours, or has next to nothing to do.
    """

    phase: str
    operation: str
    kernel: str
    work: Traffic
    chain: Optional[Chain] = None

    def code(self, kind: OptimizerKind, results: Path = RESULTS) -> Optional[Compiled]:
        """Its machine code in the step of this page; None without a chain, where it decides nothing."""
        if self.chain is None:
            return None
        layout = RowLayout(DIM, torch.float32, kind)
        setting: dict[str, Any] = {
            "DIM": DIM, "ROW_BYTES": layout.row_bytes, "CAPACITY": BUCKET_CAPACITY, "OPTIMIZER": int(kind),
            "DTYPE": DTYPE_CODES[torch.float32], "GRADIENT_DTYPE": DTYPE_CODES[torch.float32],
            "DECAY_MODE": int(OptimizerConfig(kind).applied_weight_decay), "DIRECT": self.phase == "evaluation",
            "TOUCH": self.phase == "forward",
        }  # fmt: skip
        return compiled(self.kernel, setting, results)

    def predicted(self, device: Device, kind: OptimizerKind, results: Path = RESULTS) -> Prediction:
        return device.predicted(self.work, self.chain, self.code(kind, results))


@dataclass(frozen=True)
class Measured:
    """A time in microseconds, and where and when it was measured."""

    microseconds: float
    where: str


def phase_rows(kind: OptimizerKind) -> list[Row]:
    """The kernels of a training step and of an evaluation of ten tables in which every id is in its table."""
    layout = RowLayout(DIM, torch.float32, kind)
    lines = traffic.touched_buckets(UNIQUE, BUCKETS)
    prefixes, gathered = traffic.sort(IDS, key_bytes=traffic.PREFIX_BYTES), traffic.gather(IDS, UNIQUE, layout)
    found = traffic.find(UNIQUE, UNIQUE, LOAD, touched=lines, touch=True)
    read = traffic.gather(IDS, UNIQUE, layout, through_inverse=False)
    return [
        Row("forward", "dedup: prefixes", "_prefix_kernel", traffic.dedup_prefix(IDS), Chain(IDS, 1)),
        Row("forward", "dedup: sort of prefixes", "sorting (cub)", prefixes),
        Row("forward", "dedup: compare neighbours", "_compare_kernel", traffic.dedup_compare(IDS), Chain(IDS, 2)),
        Row("forward", "dedup: settle, nothing to do", "_settle_kernel", Traffic()),
        Row("forward", "dedup: number entries", "_number_kernel", traffic.dedup_number(IDS, UNIQUE), Chain(IDS, 2)),
        # Key, digest line, stored key.
        Row("forward", "find, scores set", "_find_kernel", found, Chain(UNIQUE, 3)),
        Row("forward", "insert, nothing absent", "_insert_kernel", traffic.insert(UNIQUE, 0, BUCKETS)),
        Row("forward", "fill, nothing new", "_fill_kernel", traffic.fill(UNIQUE, 0, layout)),
        Row("forward", "tally", "_tally_kernel", traffic.tally(UNIQUE, TABLES), Chain(UNIQUE, 1)),
        # Entry, slot, row.
        Row("forward", "gather", "_gather_kernel", gathered, Chain(IDS, 3)),
        Row("backward", "step counted, whole blocks summed", "_begin_update_kernel", traffic.begin_update(IDS)),
        # Slot and offsets, order with the row, gradients.
        Row("backward", "update, sums included", "_update_kernel", traffic.update(IDS, UNIQUE, layout),
            Chain(UNIQUE, 3)),
        Row("evaluation", "find", "_find_kernel", traffic.find_repeated(IDS, UNIQUE, LOAD), Chain(IDS, 3)),
        Row("evaluation", "gather", "_gather_kernel", read, Chain(IDS, 2)),
        Row(INITIALIZER, "missing rows, none missing", "_fill_missing_kernel", traffic.fill_missing(IDS, 0, layout)),
    ]  # fmt: skip


def phase_seconds(device: Device, kind: OptimizerKind, phase: str, results: Path = RESULTS) -> float:
    """Of a phase of a dynamic step, all its kernels."""
    rows = [row for row in phase_rows(kind) if row.phase in PARTS.get(phase, (phase,))]
    return sum(row.predicted(device, kind, results).seconds for row in rows)


def static_seconds(device: Device, kind: OptimizerKind, phase: str) -> float:
    """The same of static tables: rows out, and a sort and the update on the way back."""
    layout, work = RowLayout(DIM, torch.float32, kind), Traffic()
    for part in PARTS.get(phase, (phase,)):
        work += (traffic.static_backward if part == "backward" else traffic.static_forward)(IDS, UNIQUE, layout)
    return device.seconds(work)


def _newest(results: Path, topic: str) -> Optional[dict[str, Any]]:
    files = sorted(results.glob(f"{topic}-*.json"), key=lambda file: file.stem[-10:])
    found: Optional[dict[str, Any]] = json.loads(files[-1].read_text()) if files else None
    return found


def _medians(results: Path, topic: str, unit: str, microseconds: float) -> dict[str, Measured]:
    """Figures of the newest results of a topic by their names."""
    run = _newest(results, topic)
    if run is None:
        return {}
    where = f"{(run.get('accelerator') or {}).get('name', 'unknown device')}, {run['date']}"
    return {
        figure["name"]: Measured(microseconds * float(figure["measured"]["median"]), where)
        for findings in run["findings"]
        for figure in findings["figures"]
        if figure["unit"] == unit
    }


def measured_kernels(kind: OptimizerKind, phase: str, results: Path = RESULTS) -> dict[str, Measured]:
    """Kernels of the dynamic side, by name, from the newest ``breakdown``; empty without one.

    An evaluation is the same for all optimizers, and measured with one.
    """
    what = {"evaluation": "dynamic, evaluation", INITIALIZER: f"{WITH_INITIALIZER}, evaluation"}
    prefix = f"{NAMES[KINDS[0] if phase in what else kind]}, {what.get(phase, 'dynamic step')}: "
    figures = _medians(results, "breakdown", "µs", 1.0)
    return {name.removeprefix(prefix): found for name, found in figures.items() if name.startswith(prefix)}


def measured_phases(kind: OptimizerKind, side: str, results: Path = RESULTS) -> dict[str, Measured]:
    """Phases of the step of a side, ``dynamic`` or ``TBE``, from the newest results of ``step``; empty without them."""
    figures = _medians(results, "step", "ms", 1e3)
    labels = {phase: "backward + update" if phase == "backward" else phase for phase in PHASES}
    names = {phase: f"{NAMES[kind]}: {side}, {label}" for phase, label in labels.items()}
    if side == "dynamic":
        names[INITIALIZER] = f"{NAMES[kind]}: {WITH_INITIALIZER}, evaluation"
    return {phase: figures[name] for phase, name in names.items() if name in figures}


def _milliseconds(found: Optional[Measured]) -> str:
    return NOT_MEASURED if found is None else f"**{found.microseconds / 1e3:.2f}** ({found.where})"


def _of_others(kind: OptimizerKind, phase: str, static: Optional[Measured]) -> list[str]:
    neighbour, published = (_published(kind, phase, is_static) for is_static in (False, True))
    predicted = 1e3 * static_seconds(H100, kind, phase)
    return [f"{neighbour:.3g}", f"{predicted:.2f}", f"{published:.3g}", _milliseconds(static)]


def _published(kind: OptimizerKind, phase: str, static: bool) -> float:
    """Milliseconds, of a step the sum of its phases."""
    parts = [step_milliseconds(kind, static, part) for part in PARTS.get(phase, (phase,))]
    return sum(part.value for part in parts if part is not None)


def _at_a_glance(results: Path) -> list[str]:
    """Prediction, publication and measurement of every phase, in milliseconds."""
    lines = [
        "| milliseconds | predicted, H100 | predicted, H200 | **measured** | NVIDIA's dynamicemb, published, H100 | "
        "static, predicted, H100 | static (TBE), published, H100 | **static (TBE), measured** |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for kind in KINDS:
        ours, static = (measured_phases(kind, side, results) for side in ("dynamic", "TBE"))
        for phase in PHASES:
            cells = [
                f"{NAMES[kind]}, {phase}",
                *(f"{1e3 * phase_seconds(device, kind, phase, results):.2f}" for device in (H100, H200)),
                _milliseconds(ours.get(phase)),
            ]
            cells += ["", "", "", ""] if phase == INITIALIZER else _of_others(kind, phase, static.get(phase))
            lines.append(f"| {' | '.join(cells)} |")
    return [_status(lines), "", *lines, ""]


def _status(lines: Sequence[str]) -> str:
    missing = sum(line.count(NOT_MEASURED) for line in lines)
    total = len(KINDS) * (2 * len(PHASES) - 1)
    if missing == total:
        return "**Nothing in this table has been measured on a device yet.**"
    return f"**Measured on a device: {total - missing} of {total} figures; the others say so.**"


def _kernel_table(title: str, kind: OptimizerKind, rows: Sequence[Row], results: Path) -> list[str]:
    lines = [
        f"{title}, H200:",
        "",
        "| phase | kernel | MB moved | random accesses | registers | resident warps | predicted µs | limited by | "
        "measured µs | measured / predicted |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    for row in rows:
        prediction, accesses = row.predicted(H200, kind, results), sum(row.work.accesses.values())
        code, found = row.code(kind, results), measured_kernels(kind, row.phase, results).get(row.kernel)
        cells = [
            row.phase, row.operation, f"{row.work.num_bytes / 1e6:.0f}", f"{accesses / 1e6:.2f} M",
            *(("", "") if code is None else (str(code.registers), str(code.resident_warps))),
            f"{1e6 * prediction.seconds:.0f}", prediction.limit,
            NOT_MEASURED if found is None else f"**{found.microseconds:.0f}** ({found.where})",
            "" if found is None else f"{1e-6 * found.microseconds / prediction.seconds:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _kernels(results: Path) -> list[str]:
    lines: list[str] = []
    for kind in KINDS:
        training = [row for row in phase_rows(kind) if row.phase in ("forward", "backward")]
        lines += _kernel_table(NAMES[kind], kind, training, results)
    evaluation = [row for row in phase_rows(KINDS[0]) if row.phase in ("evaluation", INITIALIZER)]
    return lines + _kernel_table("Evaluation", KINDS[0], evaluation, results)


#: The parts of the page that are written here.
SECTIONS: dict[str, Callable[[Path], list[str]]] = {"at a glance": _at_a_glance, "kernels": _kernels}


def document(section: str, results: Path = RESULTS) -> str:
    """A section, as it stands in docs/performance.md."""
    return "\n".join(SECTIONS[section](results)).rstrip() + "\n"


def rewritten(page: str) -> str:
    """``page`` with the sections of today between their marks."""
    for section in SECTIONS:
        begin, end = BEGIN.format(section=section), END.format(section=section)
        head, rest = page.split(begin)
        _, tail = rest.split(end)
        page = f"{head}{begin}\n\n{document(section)}\n{end}{tail}"
    return page


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(rewritten(PAGE.read_text()))
    else:
        print("\n".join(document(section) for section in SECTIONS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
