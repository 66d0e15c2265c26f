"""What one run found out about the kernels, and its summary by kernel and architecture."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

from rich import box
from rich.console import Console
from rich.table import Table

from ahead_of_time.architectures import ARCHITECTURES
from ahead_of_time.launches import Launch
from ahead_of_time.machine_code import MachineCode

__all__ = ["SUMMARY_COLUMNS", "Measurement", "Report", "show", "summary"]

#: Of :func:`summary`.
SUMMARY_COLUMNS = (
    "kernel", "architecture", "configurations", "registers", "spilled bytes", "shared bytes", "widest load",
    "narrowest load", "widest store", "resident warps",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One launch compiled for one architecture.

    Attributes:
        launch, compute_capability: what was compiled.
        code: the result, None where ``problem`` says why there is none.
        races: accesses that no barrier orders; see :mod:`~ahead_of_time.barriers`.
    """

    launch: Launch
    compute_capability: int
    code: Optional[MachineCode]
    problem: Optional[str] = None
    races: tuple[str, ...] = ()

    @property
    def resident_warps(self) -> int:
        assert self.code is not None
        architecture = ARCHITECTURES[self.compute_capability]
        return architecture.resident_warps(self.code.registers, self.code.shared_bytes, self.code.warps)


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        date: of the run.
        triton: version of the compiler.
        revision: of the sources, where git knows it.
        complete: whether every configuration was compiled for every architecture.
        seconds: that it took.
        processes: that compiled.
        measurements: the result.
    """

    date: datetime.date
    triton: str
    revision: Optional[str]
    complete: bool
    seconds: float
    processes: int
    measurements: list[Measurement]

    @property
    def file_stem(self) -> str:
        return f"aot-{'' if self.complete else 'part-'}triton-{self.triton}-{self.date.isoformat()}"

    @property
    def problems(self) -> list[str]:
        """What must not be: configurations that do not compile, those that spill, and those with warps that race."""
        found = []
        for measurement in self.measurements:
            where = f"{measurement.launch}, sm_{measurement.compute_capability}"
            if measurement.code is None:
                found.append(f"{where}: {measurement.problem}")
            elif measurement.code.spilled_bytes:
                found.append(f"{where}: spills {measurement.code.spilled_bytes} bytes")
            found += [f"{where}: {race}" for race in measurement.races]
        return found

    @property
    def headline(self) -> str:
        launches = {measurement.launch for measurement in self.measurements}
        kernels = {launch.kernel for launch in launches}
        names = ", ".join(
            f"{ARCHITECTURES[number].name} ({ARCHITECTURES[number].devices})" for number in self.compute_capabilities
        )
        problems = len(self.problems)
        return (
            f"{len(kernels)} kernels in {len(launches)} configurations for {names}: {len(self.measurements)} "
            f"compilations with Triton {self.triton} in {self.seconds:.0f} s (processes: {self.processes}). "
            + (f"Problems: {problems}." if problems else "All compile, none spills, and no warps race.")
        )

    @property
    def compute_capabilities(self) -> list[int]:
        return sorted({measurement.compute_capability for measurement in self.measurements})

    def by_kernel(self) -> dict[str, list[Measurement]]:
        kernels: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            kernels.setdefault(measurement.launch.kernel, []).append(measurement)
        return kernels


def _span(numbers: Iterable[int]) -> str:
    least, most = min(present := list(numbers)), max(present)
    return f"{least}" if least == most else f"{least} to {most}"


def _widths(accesses: Sequence[tuple[tuple[int, int], ...]], index: int) -> str:
    """Range of the widest (0) or the narrowest (-1) of each configuration."""
    widths = [configuration[index][0] for configuration in accesses if configuration]
    return _span(widths) if widths else "none"


def summary(report: Report) -> list[tuple[str, ...]]:
    """A row for each kernel and architecture; ranges go over the configurations that have machine code."""
    rows: list[tuple[str, ...]] = []
    for kernel, of_kernel in report.by_kernel().items():
        for number in report.compute_capabilities:
            chosen = [each for each in of_kernel if each.compute_capability == number and each.code is not None]
            if not chosen:
                continue
            codes = [each.code for each in chosen if each.code is not None]
            loads, stores = [code.loads for code in codes], [code.stores for code in codes]
            rows.append((
                kernel, ARCHITECTURES[number].name, str(len(codes)), _span(code.registers for code in codes),
                _span(code.spilled_bytes for code in codes), _span(code.shared_bytes for code in codes),
                _widths(loads, 0), _widths(loads, -1), _widths(stores, 0),
                _span(each.resident_warps for each in chosen),
            ))  # fmt: skip
    return rows


def show(console: Console, report: Report) -> None:
    """The summary on the terminal, and every problem."""
    table = Table(title="Kernels, compiled ahead of time", title_justify="left", box=box.SIMPLE_HEAD)
    for column in SUMMARY_COLUMNS:
        table.add_column(column, justify="left" if column in SUMMARY_COLUMNS[:2] else "right")
    before = ""
    for kernel, *cells in summary(report):
        table.add_row("" if kernel == before else kernel, *cells)
        before = kernel
    console.print(table)
    for problem in report.problems:
        console.print(problem, style="red", markup=False)
    console.print(report.headline, style="red" if report.problems else "green", markup=False)
