"""Findings on the terminal, as Markdown for readers and as JSON for programs."""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from figures import Figure, Findings
from files import markdown_table, write_texts
from host import Accelerator, Host
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["Run", "show", "write"]

#: When others keep more than this many cores busy, a figure says little about the code: threads that wait for each
#: other lose more than their share, so that quotients suffer too.
QUIET_CORES = 0.1
#: The same where a GPU does the work and one core of the host starts it.
QUIET_CORES_BESIDE_GPU = 1.0
COLUMNS = ("figure", "unit", "median", "p10 to p90", "expected", "target", "met")
#: Only where a figure has something to say there.
MOVED_COLUMNS = ("moved", "of copy")
PUBLISHED_COLUMN = "published"
HOW_TO_READ = (
    "Times are medians over the rounds, with the 10th and 90th percentile. A quotient is taken within each round, then "
    "summarised. *Expected* was computed without measuring the thing itself: our own times from what memory reads and "
    "one sort cost on the same machine in the same minute, which leaves out computing, so a time above it shows what "
    "there is to gain; others' times and all quotients from earlier measurements elsewhere."
)


@dataclass(frozen=True)
class Run:
    """One call of the benchmarks.

    Attributes:
        topic: what the files are called by, besides the machine and the date.
        date: of the run.
        quick: whether sizes were cut down, so that targets do not apply.
        host: where.
        revision: of the sources, where git knows it.
        findings: of each benchmark that passed its check.
        refused: why each of the others reports nothing, by name.
        seconds: that each benchmark took, by name.
        other_cores: that other processes kept busy meanwhile, by name.
        accelerator: the GPU that did the work; None for a run on the host.
        how_to_read: a paragraph about the numbers.
    """

    topic: str
    date: datetime.date
    quick: bool
    host: Host
    revision: Optional[str]
    findings: list[Findings]
    refused: dict[str, str]
    seconds: dict[str, float]
    other_cores: dict[str, float]
    accelerator: Optional[Accelerator] = None
    how_to_read: str = HOW_TO_READ

    @property
    def file_stem(self) -> str:
        slug = self.host.slug if self.accelerator is None else self.accelerator.slug
        return f"{self.topic}-{slug}-{self.date.isoformat()}"

    @property
    def quiet_cores(self) -> float:
        """Cores that others may keep busy before figures are not to be quoted."""
        return QUIET_CORES if self.accelerator is None else QUIET_CORES_BESIDE_GPU


def number(value: float) -> str:
    """Three digits that matter, more only for whole numbers."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def quantity(num_bytes: float) -> str:
    """Bytes in decimal units, as bandwidths are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{number(num_bytes / size)} {unit}"
    return f"{number(num_bytes)} B"


def _extra_columns(figures: list[Figure]) -> tuple[str, ...]:
    moved = MOVED_COLUMNS if any(figure.moved_bytes is not None for figure in figures) else ()
    return (*moved, PUBLISHED_COLUMN) if any(figure.published is not None for figure in figures) else moved


def _extra_cells(figure: Figure, columns: tuple[str, ...]) -> tuple[str, ...]:
    cells = {
        "moved": "" if figure.moved_bytes is None else quantity(figure.moved_bytes),
        "of copy": "" if figure.copy_share is None else f"{figure.copy_share:.0%}",
        PUBLISHED_COLUMN: "" if figure.published is None else str(figure.published),
    }
    return tuple(cells[column] for column in columns)


def _cells(figure: Figure, quick: bool) -> tuple[str, ...]:
    measured = figure.measured
    spread = f"{number(measured.p10)} to {number(measured.p90)}" if measured.samples > 1 else ""
    target = "" if figure.target is None or quick else str(figure.target)
    met = "" if figure.met is None or quick else "yes" if figure.met else "no"
    expected = "" if figure.expected is None else number(figure.expected)
    return figure.name, figure.unit, number(measured.median), spread, expected, target, met


def _wordy(run: Run) -> list[str]:
    """Sentences about the run as a whole."""
    host, sentences = run.host, []
    if (gpu := run.accelerator) is not None:
        sentences.append(
            f"{gpu.name}, {gpu.memory_gib:g} GiB of which {gpu.free_gib:g} were free, {gpu.multiprocessors} "
            f"multiprocessors, {gpu.cache_mib:g} MiB of cache; driver {gpu.driver}, CUDA {gpu.cuda}."
        )
    sentences.append(
        f"{host.cpu}, {host.cores} cores, {host.memory_gib:g} GiB, {host.system}; "
        + ", ".join(f"{package} {version}" for package, version in host.versions.items())
        + f". Load before the run {host.load_average:g}."
    )
    if run.quick:
        sentences.append("A quick run: sizes are too small for the targets to apply.")
    return sentences


def warning(other_cores: float, quiet_cores: float = QUIET_CORES) -> str:
    """What to say about a benchmark beside which others were at work; nothing on a quiet machine."""
    if other_cores <= quiet_cores:
        return ""
    return f"Not to be quoted: other processes kept {other_cores:.1f} cores busy meanwhile. Repeat on a quiet machine."


def show(
    console: Console, findings: Findings, quick: bool, other_cores: float, quiet_cores: float = QUIET_CORES
) -> None:
    """One benchmark as a table on the terminal."""
    table = Table(title=findings.title, title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
    extra = _extra_columns(findings.figures)
    for column in (*COLUMNS, *extra):
        table.add_column(column, justify="left" if column in ("figure", "unit") else "right")
    for figure in findings.figures:
        *cells, met = _cells(figure, quick)
        style = "bold" if figure.target is not None else None
        met = {"yes": "[green]yes[/]", "no": "[red]no[/]"}.get(met, "")
        table.add_row(*cells, met, *_extra_cells(figure, extra), style=style)
    table.caption = f"{findings.setup}\nChecked: {findings.check}"
    console.print(table)
    for name, reason in findings.left_out.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    if message := warning(other_cores, quiet_cores):
        console.print(f"[yellow]{message}[/]\n")


def markdown(run: Run) -> str:
    """The run as a document."""
    revision = "" if run.revision is None else f", revision {run.revision}"
    lines = [f"# Benchmarks: {run.topic}, {run.date.isoformat()}{revision}", ""]
    for sentence in [*_wordy(run), run.how_to_read]:
        lines += [sentence, ""]
    for findings in run.findings:
        lines += [f"## {findings.name}: {findings.title}", "", findings.setup, "", f"Checked: {findings.check}", ""]
        if message := warning(run.other_cores[findings.name], run.quiet_cores):
            lines += [f"**{message}**", ""]
        extra = _extra_columns(findings.figures)
        rows = [
            (*_cells(figure, run.quick), *_extra_cells(figure, extra), figure.reason) for figure in findings.figures
        ]
        lines += [*markdown_table((*COLUMNS, *extra, "expected because"), rows), ""]
        if findings.left_out:
            lines += ["Not measured:", "", *(f"- {name}: {why}" for name, why in findings.left_out.items()), ""]
    for name, reason in run.refused.items():
        lines += [f"## {name}", "", f"Not reported: {reason}", ""]
    lines.append("Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in run.seconds.items()))
    return "\n".join(lines) + "\n"


def as_json(run: Run) -> dict[str, Any]:
    """The run as plain data; targets come with whether they are met."""
    data = dataclasses.asdict(run)
    data["date"] = run.date.isoformat()
    for findings, plain in zip(run.findings, data["findings"], strict=True):
        for figure, plain_figure in zip(findings.figures, plain["figures"], strict=True):
            plain_figure["met"] = None if run.quick else figure.met
    return data


def write(run: Run, folder: Path) -> list[Path]:
    """Writes the run as ``<topic>-<device>-<date>`` in both formats; each file appears whole or not at all.

    Returns:
        The files.
    """
    texts = {".json": json.dumps(as_json(run), indent=1) + "\n", ".md": markdown(run)}
    return write_texts(folder, run.file_stem, texts)
