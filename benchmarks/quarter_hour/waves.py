"""Waves of an update's programs, as the profiler counts them: programs over the places that the GPU has for them."""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checks import tool
from .journal import FAILED, OK, append_line

__all__ = ["figures_of", "main"]

#: Of the profiler, with names for readers.
METRICS = {
    "launch__waves_per_multiprocessor": "waves",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps resident",
    "gpu__time_duration.sum": "time",
}
LAUNCHES = 2


def figures_of(output: str) -> dict[str, str]:
    """The metrics of the last kernel in the profiler's table, which follows other lines.

    Raises:
        ValueError: there is no table.
    """
    begin = output.find('"ID"')
    if begin < 0:
        raise ValueError(f"the profiler has profiled nothing: {output[-800:]}")
    figures = {}
    for row in csv.DictReader(io.StringIO(output[begin:])):
        if row.get("Metric Name") in METRICS:
            figures[METRICS[row["Metric Name"]]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return figures


def _profiled(profiler: str, rounds: int) -> dict[str, str]:
    options = ["--metrics", ",".join(METRICS), "--clock-control", "none", "--csv"]
    options += ["-k", "regex:^_update_kernel", "-c", str(LAUNCHES)]
    launches = [sys.executable, "-m", "quarter_hour.residency", "adam", "--launches", str(LAUNCHES)]
    command = [profiler, *options, *launches, "--rounds", str(rounds)]
    return figures_of(subprocess.run(command, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="+", type=int)
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    for rounds in options.rounds:
        start, profiler = time.perf_counter(), tool("ncu")
        assert profiler is not None
        try:
            record: dict[str, Any] = {"outcome": OK, "figures": _profiled(profiler, rounds)}
        except Exception as error:
            record = {"outcome": FAILED, "reason": f"{type(error).__name__}: {error}"}
        append_line(options.findings, {"name": str(rounds), "seconds": round(time.perf_counter() - start, 2), **record})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
