"""Runs the fast tests with other releases of torch, fbgemm, torchrec, Triton, Numba and NumPy, each in a fresh
environment, and writes what came of it into docs/compatibility.md. Needs a package index, and 6 GB of disk at a time.

    make matrix                                  all of them
    make matrix ARGS="--only torch-2.14"         those whose name contains a text; may be repeated
    make matrix ARGS="--list"                    their names
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- make matrix -->", "<!-- end of make matrix -->"

#: Columns of the table that say what was installed; together they identify a row.
PACKAGES = ("torch", "fbgemm-gpu-cpu", "torchrec", "triton", "numba", "numpy")
COLUMNS = ("Python", *PACKAGES, "fast tests", "date")
#: What the tests need besides the package's own dependencies.
EXTRAS = ("torchrec-libraries", "export", "plot", "examples", "dev")
#: Tests that a row names if they fail.
NAMED_FAILURES = 5


@dataclass(frozen=True)
class Stack:
    """What one environment gets: exact versions, or a version as a prefix (``1.6.*``)."""

    torch: str
    fbgemm: str
    torchrec: str
    triton: str
    numba: str = "0.68.1"
    numpy: str = "2.4.6"

    @property
    def name(self) -> str:
        return f"torch-{self.torch}-fbgemm-{self.fbgemm}-torchrec-{self.torchrec}-numba-{self.numba}-numpy-{self.numpy}"

    @property
    def wanted(self) -> list[str]:
        versions = (self.torch, self.fbgemm, self.torchrec, self.triton, self.numba, self.numpy)
        return [f"{package}=={version}" for package, version in zip(PACKAGES, versions)]


#: Every pair of torch and fbgemm with the oldest and the newest torchrec; every torchrec, and the oldest Numba and
#: NumPy, with the pair that make pins. torch's CUDA builds ask for one release of Triton each, and the interpreter of
#: Triton 3.6, which tests use, for a NumPy below 2.4.
STACKS = (
    Stack("2.13.0", "1.8.0", "1.8.0", "3.7.1"),
    Stack("2.13.0", "1.8.0", "1.9.2", "3.9.0"),
    Stack("2.13.0", "1.8.0", "1.7.0", "3.7.1"),
    Stack("2.13.0", "1.8.0", "1.6.1", "3.6.0", numpy="2.3.5"),
    Stack("2.13.0", "1.8.0", "1.8.0", "3.7.1", numba="0.61.0", numpy="1.26.4"),
    Stack("2.14.1", "1.9.0", "1.9.2", "3.8.0"),
    Stack("2.14.1", "1.9.0", "1.6.1", "3.8.0"),
    Stack("2.11.0", "1.6.0", "1.6.1", "3.6.0", numpy="2.3.5"),
    Stack("2.11.0", "1.6.0", "1.9.2", "3.6.0", numpy="2.3.5"),
    Stack("2.12.1", "1.7.0", "1.7.0", "3.7.1"),
    Stack("2.12.1", "1.7.0", "1.9.2", "3.7.1"),
    Stack("2.15.0", "1.9.0", "1.9.2", "3.9.0"),
)


class NotRunError(Exception):
    """pip refused, what it installed cannot be imported, or the tests did not begin; says why in one line."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="TEXT", help="only stacks whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--keep", action="store_true", help="keep the environments, and use those that are there")
    parser.add_argument("--workers", default="2", metavar="N", help="processes for the tests (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = [stack for stack in STACKS if not options.only or any(text in stack.name for text in options.only)]
    if options.list:
        print("\n".join(stack.name for stack in chosen))
        return 0
    for stack in chosen:
        print(f"{stack.name} ...", flush=True)
        row = tried(stack, options.keep, options.workers)
        PAGE.write_text(with_row(PAGE.read_text(), row))
        print(" | ".join(row), flush=True)
    return 0


def tried(stack: Stack, keep: bool, workers: str) -> list[str]:
    """The stack's row: what was installed, and the outcome of the fast tests or why there was none."""
    folder = ENVIRONMENTS / stack.name
    python = folder / "bin" / "python"
    try:
        if not (keep and python.exists()):
            _install(stack, folder)
        versions = _versions(python)
        outcome = _tested(python, folder, workers)
    except NotRunError as reason:
        versions = dict(wanted.split("==") for wanted in stack.wanted)
        outcome = f"not run: {reason}"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [platform.python_version(), *(versions[package] for package in PACKAGES), outcome, today]


def _install(stack: Stack, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torchrec = next(wanted for wanted in stack.wanted if wanted.startswith("torchrec"))
    others = [wanted for wanted in stack.wanted if wanted != torchrec]
    # This package and torchrec without what they ask for: the ranges may be what is to be moved.
    _run([*pip, *others, *_other_requirements()])
    _run([*pip, "--no-deps", torchrec, str(ROOT)])


def _other_requirements() -> list[str]:
    """What the package, torchrec and the tests need, without the packages whose versions a stack says. No pins: each
    torch has limits of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [text for name in EXTRAS for text in extras[name]]
    names = {text: re.match(r"[\w.-]+", text)[0] for text in wanted}  # type: ignore[index]
    return [text for text, name in names.items() if name not in (*PACKAGES, project["name"])]


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import dynamicemb.shard; from importlib.metadata import version; "
        f"print(*(version(name) for name in {PACKAGES!r}))"
    )
    return dict(zip(PACKAGES, _run([str(python), "-c", code]).split()))


def _tested(python: Path, folder: Path, workers: str) -> str:
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", "-p", "no:cacheprovider"]
    command += ["--numprocesses", workers, "--dist", "loadfile", "--no-loadscope-reorder"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode not in (0, 1) or not report.exists():
        raise NotRunError(_last_line(done.stdout + done.stderr))
    if done.returncode:
        print(done.stdout[-20_000:], flush=True)
    return outcome(ElementTree.parse(report))


def outcome(report: ElementTree.ElementTree) -> str:
    """``812 passed, 9 skipped`` and the names of the first tests that failed, from pytest's report for JUnit."""
    cases = list(report.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"failed": len(failed), "passed": len(cases) - len(failed) - skipped, "skipped": skipped}
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    names = [f"`{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}`" for case in failed]
    more = ["..."] if len(names) > NAMED_FAILURES else []
    return f"{text}: {', '.join(names[:NAMED_FAILURES] + more)}" if names else text


def with_row(page: str, row: Sequence[str]) -> str:
    """The page with a row in its table, in place of the one with the same versions if there is one."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    table = rest.partition(END)[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in table.splitlines() if re.match(r"\| \d", line)]
    key = len(PACKAGES) + 1
    rows = [other for other in rows if other[:key] != list(row[:key])] + [[cell.replace("|", "/") for cell in row]]
    rows.sort(key=lambda cells: [[int(number) for number in re.findall(r"\d+", cell)] for cell in cells[1:key]])
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return before + "\n".join([BEGIN, *lines, END]) + after


def _environment() -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise NotRunError(_last_line(done.stderr))
    return done.stdout


def _last_line(text: str) -> str:
    """The last line that says what is wrong, without the folders of this machine and without a remedy."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR: |[\w.]*Error: )", line)]
    return re.sub(r"(?<![\w.])/\S*/", "", (errors or lines or ["no message"])[-1]).partition("; run: ")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
