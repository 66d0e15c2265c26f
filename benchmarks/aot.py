"""Compiles every Triton kernel in every configuration that the package can launch, without a GPU.

    python benchmarks/aot.py                          all, several minutes; written to benchmarks/results
    python benchmarks/aot.py --quick                  a part, for trying out; only printed
    python benchmarks/aot.py --kernel _find_kernel    one kernel; may be given several times
    python benchmarks/aot.py --architecture 90        one architecture; may be given several times

Compiled code stays in Triton's cache, so a second run takes seconds. Another version of Triton is taken from a folder
that PYTHONPATH names. The exit status is 1 if something does not compile, spills, or has warps that race.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from ahead_of_time.architectures import ARCHITECTURES
from ahead_of_time.barriers import races
from ahead_of_time.configurations import ALL, SOME, launches_of
from ahead_of_time.documents import write
from ahead_of_time.launches import Launch
from ahead_of_time.machine_code import compiled, machine_code
from ahead_of_time.report import Measurement, Report, show
from files import revision
from processes import quieten_libraries
from rich.console import Console
from rich.progress import Progress

RESULTS = Path(__file__).resolve().parent / "results"
#: Columns of the table where there is no terminal to ask.
PIPED_WIDTH = 170


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every kernel, in some configurations")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="compile this one; repeat for more")
    parser.add_argument(
        "--architecture", action="append", type=int, choices=ARCHITECTURES, help="compile for this one; repeat for more"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", default=len(os.sched_getaffinity(0)), help="that compile (default: cores)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for the JSON and Markdown files (default: benchmarks/results; for a part: none)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def _measurement(task: tuple[Launch, int]) -> Measurement:
    """Compiles in whatever process this is; what goes wrong is part of the result."""
    launch, compute_capability = task
    try:
        code = machine_code(launch, compute_capability)
        found = races(compiled(launch, compute_capability).asm["ptx"])
        return Measurement(launch, compute_capability, code, races=tuple(found))
    except Exception as error:  # Triton's passes, ptxas and its assembler each have their own
        return Measurement(launch, compute_capability, None, f"{type(error).__name__}: {error}")


def _measured(tasks: Sequence[tuple[Launch, int]], processes: int) -> Iterable[Measurement]:
    """In order, each as soon as it and those before it are there."""
    if processes == 1:
        yield from map(_measurement, tasks)
        return
    # Fresh processes: torch's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield from executor.map(_measurement, tasks)


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    quieten_libraries()
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    start = time.perf_counter()
    launches = launches_of(SOME if options.quick else ALL)
    chosen = [launch for launch in launches if options.kernel is None or launch.kernel in options.kernel]
    if not chosen:
        console.print(f"No such kernel. There are: {', '.join(sorted({launch.kernel for launch in launches}))}")
        return 2
    tasks = list(itertools.product(chosen, options.architecture or ARCHITECTURES))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        compiling = progress.track(_measured(tasks, options.processes), len(tasks), description="compiling")
        measurements = list(compiling)
    report = Report(
        date=datetime.date.today(),
        triton=triton.__version__,
        revision=revision(),
        complete=not (options.quick or options.kernel or options.architecture),
        seconds=round(time.perf_counter() - start, 1),
        processes=options.processes,
        measurements=measurements,
    )
    show(console, report)
    folder = options.output or (RESULTS if report.complete else None)
    if folder is not None:
        for file in write(report, folder):
            console.print(f"written: {file}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
