"""Measures speed and memory beside TorchRec's and fbgemm's own tables, all in one run on one machine.

    python benchmarks/run.py                          everything, a few minutes; written to benchmarks/results
    python benchmarks/run.py --only table_step        one of them; may be given several times
    python benchmarks/run.py --quick                  small sizes, for trying out; only printed

A benchmark first checks that both sides compute the same thing, and reports nothing if they do not. The exit status is
1 if that happened, and 0 otherwise, whether or not the targets are met.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from figures import CheckError, Findings
from files import revision
from host import Host, OtherLoad
from output import Run, show, write
from processes import quieten_libraries
from rich.console import Console

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("table_step", "collection_step", "lookup_vs_mch", "scaling", "memory", "checkpoint")
#: Columns of the tables where there is no terminal to ask.
PIPED_WIDTH = 130


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one; repeat for more")
    parser.add_argument("--quick", action="store_true", help="small sizes, to which the targets do not apply")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for the JSON and Markdown files (default: benchmarks/results; with --quick: none)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def _topic(names: Sequence[str], quick: bool) -> str:
    """``cpu`` for all benchmarks, else the names of those that ran."""
    topic = "cpu" if tuple(names) == BENCHMARKS else "-".join(name.replace("_", "-") for name in names)
    return f"quick-{topic}" if quick else topic


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    quieten_libraries()
    console, host = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH), Host.here()
    names = [name for name in BENCHMARKS if options.only is None or name in options.only]
    findings: list[Findings] = []
    refused: dict[str, str] = {}
    seconds: dict[str, float] = {}
    other_cores: dict[str, float] = {}
    for name in names:
        start, others = time.perf_counter(), OtherLoad()
        with console.status(f"{name} …"):
            module = importlib.import_module(name)
            try:
                findings.append(module.measure(module.QUICK if options.quick else module.FULL))
            except CheckError as failure:
                refused[name] = str(failure)
        seconds[name], other_cores[name] = time.perf_counter() - start, others.cores()
        if name in refused:
            console.print(f"[red]{name}: not reported, the check failed: {refused[name]}[/]")
        else:
            show(console, findings[-1], options.quick, other_cores[name])
    run = Run(
        topic=_topic(names, options.quick),
        date=datetime.date.today(),
        quick=options.quick,
        host=host,
        revision=revision(),
        findings=findings,
        refused=refused,
        seconds=seconds,
        other_cores=other_cores,
    )
    folder = options.output or (None if options.quick else HERE / "results")
    if folder is not None:
        for file in write(run, folder):
            console.print(f"written: {file}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
