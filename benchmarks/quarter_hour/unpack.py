"""Unpacks the bundle: libraries that the machine lacks, and compiled kernels. What has been unpacked before stays."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .journal import FAILED, OK, SKIPPED, append_line

__all__ = ["KERNELS", "LIBRARIES", "main"]

#: Archives in the folder of the bundle.
LIBRARIES, KERNELS = "site.tar.xz", "kernels.tar.xz"


def _unpack_libraries(archive: Path, folder: Path) -> dict[str, Any]:
    if folder.exists():
        return {"unpacked before": str(folder)}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    os.rename(partial, folder)
    return {"folder": str(folder), "packages": sorted(path.name for path in folder.iterdir() if path.is_dir())}


def _install_kernels(archive: Path) -> dict[str, Any]:
    from .kernel_cache import install  # imports Triton

    return vars(install(archive))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=("kernels", "libraries"))
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--site", type=Path, required=True, metavar="DIR", help="where libraries go")
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in options.names:
        start, archive = time.perf_counter(), options.bundle / {"kernels": KERNELS, "libraries": LIBRARIES}[name]
        record: dict[str, Any] = {"outcome": SKIPPED, "reason": f"there is no {archive}"}
        if archive.exists():
            try:
                unpacked = _install_kernels(archive) if name == "kernels" else _unpack_libraries(archive, options.site)
                record = {"outcome": OK, "figures": unpacked}
            except Exception as error:
                record = {"outcome": FAILED, "reason": f"{type(error).__name__}: {error}"}
        append_line(options.findings, {"name": name, "seconds": round(time.perf_counter() - start, 2), **record})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
