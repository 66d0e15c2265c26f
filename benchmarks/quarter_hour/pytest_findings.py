"""A plugin of pytest that appends each test's outcome to a file as soon as it is known (``-p``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from .journal import FAILED, OK, SKIPPED, append_line

__all__: list[str] = []

_REASON_BYTES = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("findings")
    group.addoption("--findings", type=Path, metavar="FILE", help="append a line of JSON for each test")
    group.addoption("--each-test", type=int, metavar="N", help="run the first N cases of each test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("each_test")
    if most is None:
        return
    seen: dict[tuple[Path, str], int] = {}
    chosen = []
    for item in items:
        test = item.path, item.name.partition("[")[0]
        seen[test] = seen.get(test, 0) + 1
        if seen[test] <= most:
            chosen.append(item)
    items[:] = chosen


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("findings")
    if file is not None and not hasattr(config, "workerinput"):  # a worker's reports come to the one that started it
        config.pluginmanager.register(_Reports(file))


class _Reports:
    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = {"passed": OK, "failed": FAILED, "skipped": SKIPPED}[report.outcome]
        record = {"name": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2)}
        if outcome == FAILED:
            record["reason"] = str(report.longrepr)[-_REASON_BYTES:]
        elif outcome == SKIPPED:
            record["reason"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        append_line(self._file, record)
