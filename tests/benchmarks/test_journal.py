"""Findings as lines and archives, which are whole and small enough whatever happens."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from quarter_hour import journal as journal_module
from quarter_hour.journal import Interruption, Journal, append_line, read_lines
from quarter_hour.snapshots import Snapshots

from tests.benchmarks.staged import started
from tests.processes import TIMEOUT_SECONDS


def test_an_interruption_waits_for_the_end_of_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a finding would be counted and not be there, or be there and not be counted."""
    append, before = journal_module.append_line, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    interruption = Interruption()
    journal = Journal(tmp_path / "findings.jsonl", 1, interruption.held)

    def interrupted(path: Path, record: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        append(path, record)

    try:
        interruption.install()
        monkeypatch.setattr(journal_module, "append_line", interrupted)
        with pytest.raises(SystemExit, match="interrupted"):
            journal.add("one", "ok", 1.0)
        journal.add("two", "failed", 1.0)  # a second signal has no effect
        interruption.install()
        with pytest.raises(SystemExit, match="interrupted"):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [record["name"] for record in read_lines(tmp_path / "findings.jsonl")[0]] == ["one", "two"]
    assert journal.outcomes == {"ok": 1, "failed": 1, "skipped": 0}


def test_an_archive_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "one.json").write_text("{}")
    monkeypatch.setattr("quarter_hour.snapshots._add", fails)
    Snapshots(tmp_path / "results", tmp_path / "part.tar.gz", 60).finish()
    assert [file.name for file in tmp_path.iterdir()] == ["results"]


def test_findings_stay_below_what_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "findings.jsonl", 1)
    journal.add("long", "failed", 1.0, {"time": 3}, "first" + "x" * 100_000 + "last")
    journal.add("many", "ok", 1.0, {str(number): number for number in range(100_000)})
    with (tmp_path / "findings.jsonl").open("ab") as file:
        file.write(b" " * (12 << 20) + b"\n")
    journal.add("late", "failed", 1.0, {"time": 3}, "reason")
    long, many, late = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert long["figures"] == {"time": 3} and len(long["reason"]) < 5000
    assert long["reason"].startswith("firstx") and long["reason"].endswith("xlast")
    assert list(many["figures"]) == ["left out"]
    assert late["outcome"] == "failed" and not {"figures", "reason"} & set(late)


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    append_line(file, {"name": "one"})
    with file.open("ab") as lines:
        lines.write(b'{"name": "tw')
    records, end = read_lines(file)
    assert records == [{"name": "one"}] and end == len('{"name": "one"}\n')
    with file.open("ab") as lines:
        lines.write(b'o"}\n\xff{"na\n')  # of a process that was killed within a write
    append_line(file, {"name": "three"})
    assert [record["name"] for record in read_lines(file, end)[0]] == ["two", "three"]


def test_archives_stay_below_what_comes_back(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; import os; from quarter_hour.snapshots import Snapshots\n"
        "Path('results').mkdir(); Path('results/small.json').write_text('{}')\n"
        "for name in ('a.bin', 'b.bin'): Path('results', name).write_bytes(os.urandom(9 << 20))\n"
        "Path('results/long.log').write_text('first' + 'x' * (3 << 20) + 'last')\n"
        "Snapshots(Path('results'), Path('part.tar.gz'), 60).finish()"
    )
    process = started(tmp_path, [sys.executable, "-c", script])
    assert process.wait(TIMEOUT_SECONDS) == 0
    assert (tmp_path / "part.tar.gz").stat().st_size < 16 << 20
    with tarfile.open(tmp_path / "part.tar.gz") as tar:
        assert set(tar.getnames()) == {"small.json", "long.log", "a.bin", "left-out.txt"}
        log, left_out = tar.extractfile("long.log"), tar.extractfile("left-out.txt")
        assert log is not None and log.read().endswith(b"xlast")
        assert left_out is not None and left_out.read() == b"b.bin"
