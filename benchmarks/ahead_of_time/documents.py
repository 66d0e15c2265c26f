"""A run as Markdown for readers and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from files import markdown_table, write_texts

from ahead_of_time.architectures import ARCHITECTURES
from ahead_of_time.grouping import grouped, telling_names
from ahead_of_time.launches import Launch
from ahead_of_time.report import SUMMARY_COLUMNS, Measurement, Report, summary
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.kernels.rows_triton import DTYPE_CODES
from dynamicemb.kernels.update import WeightDecayMode

__all__ = ["as_json", "markdown", "write"]

HOW_TO_READ = (
    "Compiled without a GPU; nothing here was run. *Registers* are those of a thread, *spilled bytes* the memory of a "
    "thread that stands in for registers, *shared bytes* those of a program. *Loads* and *stores* are accesses to "
    "global memory in PTX, by the bytes that a thread moves with one instruction: 16 is 128 bits. *Resident warps* "
    "(64 at most) fit on one multiprocessor at the same time, computed from registers, shared memory and the size of a "
    "program. A range goes over the configurations of a kernel."
)
OUTCOMES = ("warps", "registers", "resident warps", "shared bytes", "loads", "stores")
HOW_TO_READ_SECTIONS = (
    "Below, the configurations of each kernel. A line stands for all combinations of the values in it, which have the "
    "same result. Its first columns are those constants, argument types and compiler options that tell the "
    "configurations of the kernel apart; the others follow from them. Where architectures differ, values are in the "
    "order {architectures}. 20 × 16 are 20 instructions of 16 bytes. DTYPE: {dtypes}. OPTIMIZER: {optimizers}. "
    "DECAY_MODE: {decay_modes}."
)


def _accesses(widths: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{count} × {width}" for width, count in widths) or "none"


def _across(values: Sequence[Any]) -> str:
    """One value where all architectures agree, else each of them in order."""
    return str(values[0]) if len(set(values)) == 1 else " / ".join(str(value) for value in values)


def _outcome(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    codes = [measurement.code for measurement in measurements if measurement.code is not None]
    return (
        _across([code.warps for code in codes]),
        _across([code.registers for code in codes]),
        _across([measurement.resident_warps for measurement in measurements]),
        _across([code.shared_bytes for code in codes]),
        _across([_accesses(code.loads) for code in codes]),
        _across([_accesses(code.stores) for code in codes]),
    )


def _by_launch(measurements: Sequence[Measurement]) -> dict[Launch, list[Measurement]]:
    of_launch: dict[Launch, list[Measurement]] = {}
    for measurement in measurements:
        of_launch.setdefault(measurement.launch, []).append(measurement)
    return of_launch


def _section(kernel: str, measurements: Sequence[Measurement]) -> list[str]:
    of_launch = _by_launch([measurement for measurement in measurements if measurement.code is not None])
    if not of_launch:
        return []
    names = telling_names([launch.setting for launch in of_launch])
    settings = [tuple(launch.setting[name] for name in names) for launch in of_launch]
    rows = grouped(settings, [_outcome(each) for each in of_launch.values()])
    return ["", f"## {kernel}", "", *markdown_table((*names, *OUTCOMES), rows)]


def markdown(report: Report) -> str:
    """The run as a document."""
    revision = "" if report.revision is None else f", revision {report.revision}"
    sections = HOW_TO_READ_SECTIONS.format(
        architectures=", ".join(ARCHITECTURES[number].name for number in report.compute_capabilities),
        dtypes=", ".join(f"{code} {str(dtype).removeprefix('torch.')}" for dtype, code in DTYPE_CODES.items()),
        optimizers=", ".join(f"{int(kind)} {kind.name}" for kind in OptimizerKind),
        decay_modes=", ".join(f"{int(mode)} {mode.name}" for mode in WeightDecayMode),
    )
    lines = [f"# Kernels compiled ahead of time, {report.date.isoformat()}{revision}", "", report.headline, ""]
    lines += [line for problem in report.problems for line in (f"- {problem}", "")]
    lines += [HOW_TO_READ, "", *markdown_table(SUMMARY_COLUMNS, summary(report)), "", sections]
    for kernel, measurements in report.by_kernel().items():
        lines += _section(kernel, measurements)
    return "\n".join(lines) + "\n"


def _plain(measurement: Measurement) -> dict[str, Any]:
    if measurement.code is None:
        return {"problem": measurement.problem}
    data = {**dataclasses.asdict(measurement.code), "resident_warps": measurement.resident_warps}
    return {**data, "races": measurement.races} if measurement.races else data


def _kernel_data(measurements: Sequence[Measurement]) -> dict[str, Any]:
    of_launch = _by_launch(measurements)
    settings = [launch.setting for launch in of_launch]
    common = {name: value for name, value in settings[0].items() if all(other[name] == value for other in settings)}
    configurations = [
        {
            "setting": {name: value for name, value in launch.setting.items() if name not in common},
            **{ARCHITECTURES[each.compute_capability].name: _plain(each) for each in each_architecture},
        }
        for launch, each_architecture in of_launch.items()
    ]
    return {"module": measurements[0].launch.module, "common": common, "configurations": configurations}


def as_json(report: Report) -> str:
    """The run as data, a line for each configuration; what all configurations of a kernel share is in ``common``."""
    head = {name: getattr(report, name) for name in ("triton", "revision", "complete", "seconds", "processes")}
    kernels = {kernel: _kernel_data(measurements) for kernel, measurements in report.by_kernel().items()}
    text = json.dumps({"date": report.date.isoformat(), **head, "kernels": kernels})
    return text.replace('{"setting"', '\n{"setting"') + "\n"


def write(report: Report, folder: Path) -> list[Path]:
    """Writes the run in both formats. Returns the files."""
    return write_texts(folder, report.file_stem, {".json": as_json(report), ".md": markdown(report)})
