"""Stages: nothing that fails, hangs or dies stops the rest, and what was found by then is whole."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from quarter_hour.journal import read_lines

from tests.benchmarks.staged import driver, found, outcomes, started
from tests.processes import TIMEOUT_SECONDS, command_line, kill_tree, processes


class Sleeper:
    """A process that others know by nothing, and we by how long it is to sleep, which no other does."""

    def __init__(self) -> None:
        self._seconds = f"120.{secrets.randbelow(10**12):012}"

    @property
    def code(self) -> str:
        """Starts it, in a session of its own."""
        return f"import subprocess; subprocess.Popen(['sleep', '{self._seconds}'], start_new_session=True)\n"

    def pids(self) -> list[int]:
        """Of those that run. One that has ended, and is not reaped, has no command line any more."""
        return [pid for pid in processes() if command_line(pid) == ["sleep", self._seconds]]


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Ended afterwards, even where a test has found it alive."""
    started = Sleeper()
    yield started
    for pid in started.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def runs(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_sleeper_is_seen(sleeper: Sleeper) -> None:
    subprocess.run([sys.executable, "-c", sleeper.code], check=True)
    assert len(sleeper.pids()) == 1


def test_what_hangs_is_killed_with_all_that_it_started(tmp_path: Path, sleeper: Sleeper) -> None:
    hangs = f"{sleeper.code}say('one'); time.sleep(70)"
    findings = found(
        tmp_path,
        f"stage('hangs', {hangs!r}, ('one', 'two'), silence_seconds=5), stage('next', 'say(\"three\")', ('three',))",
    )
    assert outcomes(findings) == {
        "hangs: one": "ok", "hangs: two": "failed", "hangs": "failed", "next: three": "ok", "next": "ok",
    }  # fmt: skip
    assert "nothing was heard of it for 5 s" in findings["hangs: two"]["reason"]
    assert sleeper.pids() == []


def test_what_is_left_behind_ends_too(tmp_path: Path, sleeper: Sleeper) -> None:
    """By a process that ended well: its child, in a session of its own, has no parent that could be asked."""
    assert outcomes(found(tmp_path, f"stage('leaves', {sleeper.code!r})")) == {"leaves": "ok"}
    assert sleeper.pids() == []


def test_what_crashes_is_started_anew_for_the_rest(tmp_path: Path) -> None:
    crashes = "for name in sys.argv[1:-2]:\n    if name == 'two': os.kill(os.getpid(), signal.SIGSEGV)\n    say(name)"
    findings = found(tmp_path, f"stage('crashes', {crashes!r}, ('one', 'two', 'three'))")
    assert outcomes(findings) == {
        "crashes: one": "ok", "crashes: two": "failed", "crashes: three": "ok", "crashes": "failed",
    }  # fmt: skip
    assert f"ended by signal {int(signal.SIGSEGV)}" in findings["crashes: two"]["reason"]


def test_a_lost_device_costs_no_more_than_the_finding_that_lost_it(tmp_path: Path) -> None:
    """The status asks for a new process, unless there would be no end of them."""
    loses = (
        "for name in sys.argv[1:-2]:\n"
        "    if name == 'three': sys.exit(75)\n"
        "    say(name, 'failed' if name == 'one' else 'ok')\n"
        "    if name == 'one': sys.exit(75)"
    )
    findings = found(tmp_path, f"stage('loses', {loses!r}, ('one', 'two', 'three', 'four'))")
    assert outcomes(findings) == {
        "loses: one": "failed", "loses: two": "ok", "loses: three": "failed", "loses: four": "ok", "loses": "failed",
    }  # fmt: skip
    assert "exit status 75" in findings["loses: three"]["reason"]


def test_what_cannot_be_imported_or_started_is_a_finding(tmp_path: Path) -> None:
    no_program = "Stage('none', lambda pending, left: ['./no-such-program'])"
    findings = found(tmp_path, f"stage('fails', 'import no_such_module'), {no_program}, stage('next', '')")
    assert outcomes(findings) == {"fails": "failed", "none": "failed", "next": "ok"}
    assert "No module named 'no_such_module'" in findings["fails"]["reason"]
    assert "no-such-program" in findings["none"]["reason"]


def test_the_time_is_kept(tmp_path: Path) -> None:
    start = time.monotonic()
    stages = (
        "stage('long', 'say(\"one\"); time.sleep(200)', ('one', 'two'), seconds=200), stage('late', '', ('three',))"
    )
    findings = found(tmp_path, stages, seconds=10, beside="stage('beside', 'time.sleep(200)', seconds=200)")
    assert time.monotonic() - start < 100  # with two starts of Python on a busy machine
    assert outcomes(findings) == {
        "long: one": "ok", "long: two": "skipped", "long": "skipped", "late: three": "skipped", "late": "skipped",
        "beside": "skipped",
    }  # fmt: skip
    assert "out of time" in findings["long: two"]["reason"] and "no time is left" in findings["late"]["reason"]
    assert sum(finding["seconds"] for name, finding in findings.items() if name in ("long", "late")) < 50


def test_what_a_kill_does_not_end_is_not_waited_for(tmp_path: Path, sleeper: Sleeper) -> None:
    """A process inside a driver's call; here one that nobody kills, and what it has left behind."""
    before = "os.kill = os.killpg = lambda *_: None"
    start = time.monotonic()
    sleeps = f"{sleeper.code}time.sleep(120)"
    findings = found(tmp_path, f"stage('stuck', {sleeps!r}, seconds=1, least_seconds=0)", seconds=1, before=before)
    assert time.monotonic() - start < 100  # with two starts of Python on a busy machine
    assert outcomes(findings) == {"stuck": "skipped"}


def test_after_an_interruption_nothing_is_started(tmp_path: Path) -> None:
    """A stage in another thread still has something to find when its process is killed."""
    before = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); atexit.register(time.sleep, 0.5)"
    beside = "stage('beside', 'say(\"one\"); time.sleep(70)', ('one', 'two', 'three'))"
    process = started(tmp_path, driver("stage('long', 'time.sleep(70)')", beside=beside, before=before))
    assert process.stdout is not None and "beside: one" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert {line["name"]: line["outcome"] for line in map(json.loads, output.splitlines())} == {
        "long": "skipped", "beside: two": "skipped", "beside: three": "skipped", "beside": "skipped",
    }  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "results").glob("beside.*.jsonl")) == ["beside.0.jsonl"]


def test_a_process_ends_with_the_command(tmp_path: Path) -> None:
    """Which nothing can prevent from being killed."""
    process = started(tmp_path, driver("stage('long', 'say(str(os.getpid())); time.sleep(70)')"))
    assert process.stdout is not None
    child = json.loads(process.stdout.readline())["name"].split()[-1]
    process.kill()
    process.communicate(timeout=TIMEOUT_SECONDS)
    limit = time.monotonic() + 60
    while runs(child):
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_newly_compiled_kernels_are_named(tmp_path: Path) -> None:
    """Triton keeps the source of what it compiles, which an installed kernel comes without."""
    installs = "os.makedirs('cache/ONE'); open('cache/ONE/_insert_kernel.cubin', 'w').close()"
    compiles = (
        "os.makedirs('cache/TWO'); [open(f'cache/TWO/_find_kernel.{s}', 'w').close() for s in ('cubin', 'source')]"
    )
    findings = found(tmp_path, f"stage('installs', {installs!r}), stage('compiles', {compiles!r}), stage('after', '')")
    assert findings["compiles"]["figures"] == {"kernels compiled": 1, "which": ["_find_kernel"]}
    assert "figures" not in findings["installs"] and "figures" not in findings["after"]


def test_a_kill_leaves_whole_lines_and_a_whole_archive(tmp_path: Path) -> None:
    counts = "number = 0\nwhile True: say(str(number)); number += 1; time.sleep(0.01)"
    process = started(tmp_path, driver(f"stage('counts', {counts!r})"))
    journal, archive = tmp_path / "out" / "findings.jsonl", tmp_path / "out" / "part.tar.gz"
    while not archive.exists() or len(read_lines(journal)[0]) < 100:
        time.sleep(0.02)
        assert process.poll() is None
    before = archive.stat().st_mtime_ns
    while archive.stat().st_mtime_ns == before:  # it is written again and again
        time.sleep(0.02)
    kill_tree(process)
    assert journal.read_bytes().endswith(b"\n")
    assert [json.loads(line)["name"] for line in journal.read_text().splitlines()][:3] == [
        "counts: 0", "counts: 1", "counts: 2",
    ]  # fmt: skip
    with tarfile.open(archive) as tar:
        assert set(tar.getnames()) == {"counts.log", "counts.0.jsonl"}
        content = tar.extractfile("counts.0.jsonl")
        assert content is not None and len(content.read().splitlines()) > 3


def test_a_terminal_that_has_gone_stops_nothing(tmp_path: Path) -> None:
    process = started(tmp_path, driver("stage('one', 'time.sleep(0.5)'), stage('two', ''), stage('three', '')"))
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(TIMEOUT_SECONDS) == 0
    names = [record["name"] for record in read_lines(tmp_path / "out" / "findings.jsonl")[0]]
    assert names == ["one", "two", "three"]


def test_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    """It gets full while the first stage runs, and has room again in the third. Another file system would have to be
    mounted, so it is a limit on the size of files that is reached."""
    before = (
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "most = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "class Limiting:\n"
        "    def __init__(self, limits): self.limits = limits\n"
        "    def __call__(self, pending, left):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)\n"
        "        return [sys.executable, '-c', '']\n"
        "(results / 'noise.bin').write_bytes(os.urandom(1 << 16))"
    )
    stages = "Stage('first', Limiting(most)), Stage('full', Limiting((0, most[1]))), Stage('after', Limiting(most))"
    process = started(tmp_path, driver(stages, before=before))
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0
    assert [json.loads(line)["name"] for line in output.splitlines()] == ["first", "full", "after"]
    names = [record["name"] for record in read_lines(tmp_path / "out" / "findings.jsonl")[0]]
    assert names == ["first", "after"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["findings.jsonl", "part.tar.gz"]
    with tarfile.open(tmp_path / "out" / "part.tar.gz") as tar:
        assert {"first.log", "after.log", "noise.bin"} <= set(tar.getnames())
