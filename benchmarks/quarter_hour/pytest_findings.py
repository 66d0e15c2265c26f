"""A plugin of pytest that appends each test's outcome to a file as soon as it is known (``-p``)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .journal import FAILED, OK, SKIPPED, append_line

__all__: list[str] = []

_REASON_BYTES = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("findings")
    group.addoption("--findings", type=Path, metavar="FILE", help="append a line of JSON for each test")
    group.addoption("--each-test", type=int, metavar="N", help="run the last N cases of each test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The last cases: parameters are in order of size, and the first of them are often empty."""
    most = config.getoption("each_test")
    if most is None:
        return
    seen: dict[tuple[Path, str], int] = {}
    chosen = []
    for item in reversed(items):
        test = item.path, item.name.partition("[")[0]
        seen[test] = seen.get(test, 0) + 1
        if seen[test] <= most:
            chosen.append(item)
    items[:] = reversed(chosen)


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("findings")
    if hasattr(config, "workerinput"):  # a worker's reports come to the process that started it
        config.pluginmanager.register(_Worker())
    elif file is not None:
        config.pluginmanager.register(_Reports(file))


class _Worker:
    """Ends a worker of xdist whose GPU no longer answers, after the report of the test that did it.

    After an illegal access every call of CUDA fails, in this process alone. The worker would live on, fail each of its
    tests in milliseconds, and so take those of healthy workers too. xdist replaces one that dies; the test that did it
    then has a second finding, which says so.
    """

    def __init__(self) -> None:
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    @pytest.hookimpl(trylast=True)  # xdist sends the reports before
    def pytest_runtest_logfinish(self) -> None:
        if self._failed and not _gpu_answers():
            os._exit(1)
        self._failed = False


def _gpu_answers() -> bool:
    """Whether CUDA still works in this process, or is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Reports:
    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Of a module that cannot be imported or is skipped whole: it has no tests that could say so."""
        if not report.passed:
            self._append(report, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._append(report, report.duration)

    def _append(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        outcome = {"passed": OK, "failed": FAILED, "skipped": SKIPPED}[report.outcome]
        record = {"name": report.nodeid, "outcome": outcome, "seconds": round(seconds, 2)}
        if outcome == FAILED:
            record["reason"] = str(report.longrepr)[-_REASON_BYTES:]
        elif outcome == SKIPPED:
            record["reason"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        append_line(self._file, record)
