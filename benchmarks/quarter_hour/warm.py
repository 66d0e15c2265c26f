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
    parser.add_argument("names", nargs="*")
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    from tests.gpu.cases import FEW
    from tests.gpu.life import live
    from tests.gpu.scale import TOY

    for case in FEW:
        start = time.perf_counter()
        live(case, TOY)
        record = {"name": case.optimizer.name.lower(), "outcome": OK, "seconds": round(time.perf_counter() - start, 2)}
        append_line(options.findings, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
