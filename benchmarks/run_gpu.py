"""Measures the GPU engine on the GPU of this machine, beside fbgemm's static tables, all in one run.

    python benchmarks/run_gpu.py                      everything, at most 8 minutes; written to benchmarks/results
    python benchmarks/run_gpu.py --only step          one topic; may be given several times
    python benchmarks/run_gpu.py --dry-run            tiny sizes on the CPU engine, to try the code; only printed

The ceilings of the device come first, whatever else is asked for: expectations are made of them. A topic first checks
that what it times computes the right thing, and reports nothing if it does not. Each topic has a share of the time;
what did not fit is named in its results, which are written as soon as it ends. The exit status is 1 if a check failed
or a part ended in an error, 2 if there is no GPU, 75 if the device answers no more, which ends the run after that
topic, and 0 otherwise, whether or not the targets are met.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from files import revision
from gpu.device import CudaDevice, Device, HostDevice
from gpu.limits import Ceilings
from gpu.topic import Context, Outcome, run_topic
from host import Accelerator, Host, OtherLoad
from output import QUIET_CORES_BESIDE_GPU, Run, show, write
from processes import quieten_libraries
from quarter_hour.journal import FAILED, OK, SKIPPED, START_ANEW, append_line
from rich.console import Console
from run import PIPED_WIDTH

HERE = Path(__file__).resolve().parent
#: Topics in the order in which they run, and their shares of the time. What one leaves, the next ones have. The
#: profiler comes last: it changes how the driver launches in what is left of the process.
SHARES = {"ceilings": 30, "step": 75, "table": 110, "kernels": 85, "dedup": 30, "model": 85, "breakdown": 35}
#: What a topic may take of the time that is left, whatever its share is: the step beside static tables is what
#: everything is about, and is whole before others begin.
LEAST_SECONDS = {"step": 60.0}
#: For all topics together. Eight minutes less what starting Python, importing the libraries and writing takes.
SECONDS = 450.0
NO_GPU = (
    "There is no CUDA device here, and these benchmarks measure one. Use --dry-run to try their code on the CPU, or "
    "benchmarks/run.py to measure the CPU engine."
)
HOW_TO_READ = (
    "Times are by events on the device, medians with the 10th and 90th percentile. A quotient is taken within each "
    "step, then summarised. *Expected* was computed without measuring the thing itself: the bytes that have to move, "
    "counted from batch and layout, at the speeds of a copy, of random reads and of a sort that the topic *ceilings* "
    "measured in the same run; it leaves out computing, latency and launches, so a time above it shows what there is "
    "to gain. "
    "*Moved* are those bytes; *of copy* is their share of the copy bandwidth (read plus written) at the median time. "
    "*Published* are others' numbers on other hardware, for orientation."
)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=tuple(SHARES), help="run this topic; repeat for more")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU engine; needs no GPU")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"for all topics together (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for the JSON and Markdown files (default: benchmarks/results; with --dry-run: none)",
    )  # fmt: skip
    parser.add_argument("--findings", type=Path, metavar="FILE", help="append a line of JSON for each topic as it ends")
    return parser.parse_args(arguments)


def deadlines(names: Sequence[str], start: float, seconds: float) -> dict[str, float]:
    """When each topic has to end, if the time is divided by their shares among those that run."""
    total, passed, result = sum(SHARES[name] for name in names), 0, {}
    begin, end = start, start + seconds
    for name in names:
        passed += SHARES[name]
        share = start + seconds * passed / total
        begin = result[name] = max(share, min(end, begin + LEAST_SECONDS.get(name, 0.0)))
    return result


def _outcome(name: str, context: Context, deadline: float) -> Outcome:
    """Whatever happens to one topic, the next one has its turn."""
    try:
        topic = importlib.import_module(f"gpu.{name}").topic(context)
    except Exception as error:
        return Outcome(None, f"it could not be set up: {type(error).__name__}: {error}")
    return run_topic(topic, context.device, deadline)


def _lost(device: Device) -> str:
    """Why nothing can run on it any more; nothing if it can. After an invalid access every call of a process fails."""
    try:
        device.synchronize()
    except Exception as error:
        return f"the device was lost: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def _line(outcome: Outcome, lost: str) -> dict[str, Any]:
    """What became of a topic, and of the device by it, for a program that waits for it."""
    if outcome.findings is None:
        return {"outcome": FAILED, "reason": "; ".join(filter(None, [outcome.refused, lost]))}
    figures = {
        figure.name: {
            "median": figure.measured.median,
            "unit": figure.unit,
            **({} if figure.expected is None else {"expected": figure.expected}),
            **({} if figure.met is None else {"met": figure.met}),
        }
        for figure in outcome.findings.figures
    }
    word = FAILED if outcome.errors or lost else OK if figures else SKIPPED
    line: dict[str, Any] = {"outcome": word, "figures": figures}
    left_out = [f"{part}: {reason}" for part, reason in outcome.findings.left_out.items()]
    if left_out or lost:
        line["reason"] = "; ".join(filter(None, [*left_out, lost]))
    return line


@dataclass
class Session:
    """One call of the benchmarks.

    Attributes:
        context: what topics work with.
        console: where they are shown.
        accelerator, host: where they run.
        folder: where results are written; None: nowhere.
        lines: where a line is appended for each topic; None: nowhere.
        failed: topics that are not reported, and parts that ended in an error.
        lost: why nothing can run on the device any more; nothing if it can.
    """

    context: Context
    console: Console
    accelerator: Accelerator
    host: Host
    folder: Optional[Path]
    lines: Optional[Path] = None
    failed: list[str] = field(default_factory=list)
    lost: str = ""

    def run(self, name: str, deadline: float) -> None:
        """Measures, shows and writes one topic."""
        start, others = time.perf_counter(), OtherLoad()
        outcome = _outcome(name, self.context, deadline)
        self.lost = _lost(self.context.device)
        seconds, other_cores = time.perf_counter() - start, others.cores()
        self._show(name, outcome, other_cores)
        if self.lines is not None:
            append_line(self.lines, {"name": name, "seconds": round(seconds, 2), **_line(outcome, self.lost)})
        if self.folder is None:
            return
        result = Run(
            topic=name,
            date=datetime.date.today(),
            quick=self.context.dry,
            host=self.host,
            revision=revision(),
            findings=[] if outcome.findings is None else [outcome.findings],
            refused={} if outcome.findings is not None else {name: outcome.refused},
            seconds={name: seconds},
            other_cores={name: other_cores},
            accelerator=self.accelerator,
            how_to_read=HOW_TO_READ,
        )
        for file in write(result, self.folder):
            self.console.print(f"written: {file}")

    def _show(self, name: str, outcome: Outcome, other_cores: float) -> None:
        if outcome.findings is None:
            self.failed.append(name)
            self.console.print(f"{name}: not reported, {outcome.refused}", style="red", markup=False)
        else:
            show(self.console, outcome.findings, self.context.dry, other_cores, QUIET_CORES_BESIDE_GPU)
        for part, error in outcome.errors.items():
            self.failed.append(f"{name}: {part}")
            print(f"{name}: {part}\n{error}", file=sys.stderr)
        if self.lost:
            self.failed.append(f"{name}: {self.lost}")


def _device(dry: bool) -> Optional[Device]:
    """None without a GPU."""
    if dry:
        return HostDevice()
    return CudaDevice() if torch.cuda.is_available() else None


def main(arguments: Sequence[str], device: Optional[Device] = None) -> int:
    """The exit status; ``device`` is given by tests."""
    start, options = time.perf_counter(), _parse(arguments)
    device = device or _device(options.dry_run)
    if device is None:
        print(NO_GPU, file=sys.stderr)
        return 2
    quieten_libraries()
    session = Session(
        context=Context(device, Ceilings(), dry=options.dry_run),
        console=Console(width=None if sys.stdout.isatty() else PIPED_WIDTH),
        accelerator=device.facts(),
        host=Host.here(),
        folder=options.output or (None if options.dry_run else HERE / "results"),
        lines=options.findings,
    )
    names = [name for name in SHARES if options.only is None or name in ("ceilings", *options.only)]
    for name, deadline in deadlines(names, start, options.seconds).items():
        session.run(name, deadline)
        if session.lost:
            break
    if session.failed:
        session.console.print(f"failed: {'; '.join(session.failed)}", style="red", markup=False)
    if session.lost:
        return START_ANEW
    return 1 if session.failed else 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status == START_ANEW:  # destructors that call a lost device may end the process with a status of their own
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
