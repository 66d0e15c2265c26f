"""What each part consists of, the most telling first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checks import tool
from .stages import Stage

__all__ = ["SECONDS", "Place", "background", "stages"]

ROOT = Path(__file__).resolve().parents[2]
#: Of each part, if nothing else is asked for. With starting and giving back a machine they are a quarter of an hour.
SECONDS = {1: 300.0, 2: 240.0, 3: 240.0}
#: What starting Python, importing the libraries and writing take of a stage that keeps to a time of its own.
SPARE_SECONDS = 12.0
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Place:
    """Where a part runs.

    Attributes:
        bundle: folder of the archives.
        work: where it is unpacked.
        results: folder for files of results.
        dry: whether tiny sizes on the CPU are asked for.
    """

    bundle: Path
    work: Path
    results: Path
    dry: bool


def background(part: int, place: Place) -> list[Stage]:
    """Stages that run beside the others."""
    if part != 1 or place.dry:
        return []
    names = ("adam", "sgd", "adagrad", "rowwise_adagrad")
    return [Stage("cpu-engine", _module("warm"), names, seconds=150, silence_seconds=90)]


def stages(part: int, place: Place) -> list[Stage]:
    """One after the other."""
    given = ["--bundle", str(place.bundle), "--work", str(place.work), *_dry(place)]
    unpack = Stage("unpack", _module("unpack", *given), ("kernels", "wheels", "libraries"), seconds=90)
    return [unpack, *{1: _first, 2: _second, 3: _third}[part](place)]


def _first(place: Place) -> list[Stage]:
    return [
        Stage("tbe", _module("checks", *_dry(place)), ("tbe",), seconds=60, silence_seconds=45),
        Stage("machine", _module("checks", *_dry(place)), ("device", "imports"), seconds=60),
        _smoke(place),
        _topics("topics", place, ("step", "kernels", "dedup", "breakdown")),
    ]


def _second(place: Place) -> list[Stage]:
    if place.dry:
        engines = ["tests/gpu/test_engines.py", "-k", "toy and 4-float16-sgd-lru"]
        parity = ["tests/gpu/test_steady_state.py", "-k", "toy and sgd"]
        return [_tests("engines", engines, 60), _tests("parity", parity, 60)]
    last = ("tests/gpu/test_parity.py", "tests/gpu/test_sharded_step.py")
    others = (*last, "tests/gpu/test_sanitizer.py", "tests/gpu/test_interpreted.py")
    ignored = [f"--ignore={file}" for file in others]
    # By tests and not by files: most are in one file, and share nothing that takes long to make.
    workers = ["-n", "8", "--dist", "worksteal"]
    return [
        _tests("engines", [*workers, "-m", "gpu", "-k", "not ten_million", "tests/gpu", *ignored], 170),
        _tests("parity", ["-m", "gpu", last[0]], 90),
        _tests("sharded-step", ["-m", "gpu", last[1]], 60),
    ]


def _third(place: Place) -> list[Stage]:
    return [
        _tests("sanitizer", ["-m", "gpu", "tests/gpu/test_sanitizer.py"], 110),
        Stage("residency", _module("residency", *_dry(place)), ("adam", "sgd"), seconds=60),
        *_profiled(place),
        _topics("more-topics", place, ("table", "model")),
    ]


def _smoke(place: Place) -> Stage:
    """Each kernel on small inputs against the CPU engine; a crash ends one of the workers, which is replaced."""
    kernels = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests/kernels").glob("test_triton_*.py"))
    if place.dry:
        kernels = [f"tests/kernels/test_triton_{name}.py" for name in ("hashing", "tally")]
        return _tests("smoke", ["--each-test", "1", *kernels], 60, INTERPRETED)
    return _tests("smoke", ["--each-test", "1", "-n", "8", "--dist", "loadfile", *kernels], 75)


def _tests(name: str, arguments: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> Stage:
    def command(pending: tuple[str, ...], left: float) -> list[str]:
        plugins = ["-p", "no:cacheprovider", "-p", "quarter_hour.pytest_findings"]
        # A module that cannot be imported is a finding, and the others have their turn.
        return [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *plugins, *arguments]

    return Stage(name, command, seconds=seconds, silence_seconds=seconds, environment=environment or {})


def _topics(name: str, place: Place, topics: tuple[str, ...]) -> Stage:
    def command(pending: tuple[str, ...], left: float) -> list[str]:
        only = [word for topic in pending for word in ("--only", topic)]
        limits = ["--seconds", f"{max(1.0, left - SPARE_SECONDS):.0f}", "--output", str(place.results)]
        return [sys.executable, "benchmarks/run_gpu.py", *only, *limits, *_dry(place)]

    return Stage(name, command, topics, seconds=1000, silence_seconds=150, least_seconds=8)


def _profiled(place: Place) -> list[Stage]:
    """With one round of programs and with four, where there is a profiler."""
    return [] if tool("ncu") is None or place.dry else [Stage("waves", _module("waves"), ("1", "4"), seconds=90)]


def _module(name: str, *arguments: str) -> Callable[[tuple[str, ...], float], list[str]]:
    def command(pending: tuple[str, ...], left: float) -> list[str]:
        return [sys.executable, "-m", f"quarter_hour.{name}", *arguments, *pending]

    return command


def _dry(place: Place) -> list[str]:
    return ["--dry-run"] if place.dry else []
