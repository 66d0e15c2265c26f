"""Makes the folder that a GPU machine without a network needs besides the sources: docs/gpu-run.md.

    python benchmarks/gpu_bundle.py                     libraries, wheels and compiled kernels, into .gpu
    python benchmarks/gpu_bundle.py --only kernels      again, after the last change to a kernel
    python benchmarks/gpu_bundle.py --script FILE       libraries by another program, called with --out ARCHIVE

Kernels are compiled by the Triton that PYTHONPATH names, which must be the machine's version (make gpu-bundle sees to
it). Libraries that are there for this GPU are not made again. The exit status is 1 if the folder exceeds its limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_libraries
from quarter_hour.unpack import KERNELS, LIBRARIES, WHEELS

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
#: What travels has 64 MiB in all, the sources included.
LIMIT_MIB = 55.0
#: Imported by the tests and benchmarks, and installed on the machine only if it lacks them: the runner of tests needs
#: hypothesis (and it sortedcontainers), tables on a terminal rich (and it the next three), torchmetrics
#: lightning-utilities, TorchRec the others.
WHEELS_BESIDE = (
    "hypothesis", "sortedcontainers", "rich", "pygments", "markdown-it-py", "mdurl", "lightning-utilities",
    "pyre-extensions", "typing-inspect", "mypy-extensions", "portalocker", "tqdm", "cloudpickle",
)  # fmt: skip
#: Names the GPU that the libraries are for, when they are whole.
MADE_FOR = "site.gpu"
PARTS = ("libraries", "wheels", "kernels")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path(".gpu"), metavar="DIR", help="default: %(default)s")
    add("--only", action="append", choices=PARTS, help="make this; repeat for more")
    add("--script", type=Path, metavar="FILE", help="makes the libraries instead")
    add("--architecture", type=int, default=90, help="of the GPU: 90 is sm_90 (default: %(default)s)")
    add("--downloads", type=Path, default=Path("/tmp/gpu-wheels"), metavar="DIR", help="default: %(default)s")
    add("--limit", type=float, default=LIMIT_MIB, metavar="MIB", help="of the folder (default: %(default)s)")
    add("--processes", type=int, metavar="N", default=len(os.sched_getaffinity(0)), help="that compile")
    return parser.parse_args(arguments)


def _libraries(options: argparse.Namespace) -> str:
    """The archive, which appears whole or not at all, and beside it the GPU that it is for."""
    archive, stamp = options.output / LIBRARIES, options.output / MADE_FOR
    gpu = f"sm_{options.architecture}"
    if archive.exists() and stamp.exists() and stamp.read_text() == gpu:
        return f"made before for {gpu}; remove it to make it again"
    stamp.unlink(missing_ok=True)
    partial = archive.with_name(f"partial-{archive.name}")
    partial.unlink(missing_ok=True)
    if options.script is not None:
        made = subprocess.run([sys.executable, str(options.script), "--out", str(partial)])
        if made.returncode or not partial.is_file():
            wrong = f"exit status {made.returncode}" if made.returncode else f"it has not written {partial}"
            sys.exit(f"{options.script}: {wrong}; a program that makes the libraries is called with --out ARCHIVE")
        said = f"made by {options.script.name}"
    else:
        stayed, went = gpu_libraries.make_archive(partial, options.downloads, options.architecture)
        said = f"machine code: {stayed / MIB:.0f} MiB for {gpu}, {went / MIB:.0f} MiB for others blanked"
    partial.rename(archive)
    stamp.write_text(gpu)
    return said


def _wheels(options: argparse.Namespace) -> str:
    folder = options.output / WHEELS
    folder.mkdir(exist_ok=True)
    for wheel in gpu_libraries.fetched(WHEELS_BESIDE, options.downloads):
        shutil.copy(wheel, folder)
    return f"{len(WHEELS_BESIDE)} of them, for what the machine may lack"


def _kernels(options: argparse.Namespace) -> str:
    sys.path.insert(0, str(ROOT))  # the sources beside this file, and the tests, whose launches are derived from them
    import triton
    from ahead_of_time.cache import make_archive

    packed, compiled = make_archive(options.output / KERNELS, options.architecture, options.processes)
    by = f"sm_{options.architecture} by Triton {triton.__version__}"
    return f"{packed.kernels} for {by}, {compiled} of them compiled now"


MAKERS: dict[str, Callable[[argparse.Namespace], str]] = {
    "libraries": _libraries,
    "wheels": _wheels,
    "kernels": _kernels,
}


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    options = _parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.only or PARTS:
        start = time.perf_counter()
        said = MAKERS[part](options)
        place = options.output / {"libraries": LIBRARIES, "wheels": WHEELS, "kernels": KERNELS}[part]
        print(f"{place}: {_bytes(place) / MIB:.1f} MiB, {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    total = _bytes(options.output) / MIB
    print(f"{options.output}: {total:.1f} MiB of at most {options.limit:g}")
    return 1 if total > options.limit else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
