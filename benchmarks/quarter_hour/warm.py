"""Compiles the CPU engine into Numba's cache beside what else happens: comparisons with it would wait for that."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .journal import OK, append_line

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="optimizers, one of each case")
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    from tests.gpu.cases import FEW
    from tests.gpu.life import live
    from tests.gpu.scale import TOY

    cases = {case.optimizer.name.lower(): case for case in FEW}
    for name in options.names:  # after a crash those that are left
        start = time.perf_counter()
        live(cases[name], TOY)
        record = {"name": name, "outcome": OK, "seconds": round(time.perf_counter() - start, 2)}
        append_line(options.findings, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
