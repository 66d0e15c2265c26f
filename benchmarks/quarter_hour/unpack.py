"""Unpacks the bundle: libraries that the machine lacks, and compiled kernels. What has been unpacked before stays."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .journal import FAILED, OK, SKIPPED, append_line

__all__ = ["KERNELS", "LIBRARIES", "WHEELS", "main"]

#: Archives in the folder of the bundle, and a folder of wheels.
LIBRARIES, KERNELS, WHEELS = "site.tar.xz", "kernels.tar.xz", "wheels"


class _OtherVersionError(Exception):
    """The archive is for another version of a library than this one."""


def _unpack_libraries(archive: Path, folder: Path) -> dict[str, Any]:
    if folder.exists():
        return {"unpacked before": str(folder)}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    os.rename(partial, folder)
    return {"folder": str(folder), "packages": sorted(path.name for path in folder.iterdir() if path.is_dir())}


def _install_kernels(archive: Path, folder: Path) -> dict[str, Any]:
    from .kernel_cache import OtherTritonError, install  # imports Triton

    try:
        return vars(install(archive))
    except OtherTritonError as error:
        raise _OtherVersionError(str(error)) from error


def _unpack_wheels(wheels: Path, folder: Path) -> dict[str, Any]:
    """Those of which a module cannot be found: the machine's own come first."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    needed = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            tops = {name.partition("/")[0] for name in content.namelist() if name.endswith("/__init__.py")}
            modules = [top for top in tops if top.isidentifier()] or [wheel.name.partition("-")[0]]
            if all(importlib.util.find_spec(module) for module in modules):
                continue
            shutil.rmtree(partial, ignore_errors=True)
            content.extractall(partial)
        # The modules last: once they are found, the wheel is taken for whole.
        for path in sorted(partial.iterdir(), key=lambda path: path.stem in modules):
            if (folder / path.name).is_dir():  # of a part that was killed before it came to the modules
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
        partial.rmdir()
        needed.append(wheel.name)
    return {"missing here": needed}


_UNPACK = {
    "kernels": (KERNELS, _install_kernels),
    "libraries": (LIBRARIES, _unpack_libraries),
    "wheels": (WHEELS, _unpack_wheels),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=tuple(_UNPACK))
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where libraries and wheels go")
    parser.add_argument("--dry-run", action="store_true", help="leave kernels for another Triton where they are")
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in options.names:
        start, (place, unpack) = time.perf_counter(), _UNPACK[name]
        archive = options.bundle / place
        record: dict[str, Any] = {"outcome": SKIPPED, "reason": f"there is no {archive}"}
        if archive.exists():
            try:
                record = {"outcome": OK, "figures": unpack(archive, options.work / name)}
            except _OtherVersionError as error:
                # A dry run on a CPU needs no compiled kernels, nor the machine's version.
                record = {"outcome": SKIPPED if options.dry_run else FAILED, "reason": str(error)}
            except Exception as error:
                record = {"outcome": FAILED, "reason": f"{type(error).__name__}: {error}"}
        append_line(options.findings, {"name": name, "seconds": round(time.perf_counter() - start, 2), **record})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
