"""The quarter of an hour: nothing that fails, hangs or dies stops the rest, and what was found by then is whole."""

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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quarter_hour import checks, parts, warm
from quarter_hour import journal as journal_module
from quarter_hour.__main__ import _parse, environment, main
from quarter_hour.journal import Interruption, Journal, append_line, read_lines
from quarter_hour.snapshots import Snapshots
from quarter_hour.waves import figures_of

from dynamicemb.kernels.layout import OptimizerKind
from tests.benchmarks.conftest import BENCHMARKS
from tests.gpu import life
from tests.processes import TIMEOUT_SECONDS, command_line, kill_tree, processes, python_path

ROOT = BENCHMARKS.parent
#: Stages in a process of their own: whatever is no child of theirs they take for something left behind.
DRIVER = """
import atexit, os, signal, sys, time
from pathlib import Path
from quarter_hour.__main__ import run
from quarter_hour.journal import Journal
from quarter_hour.processes import adopt_orphans
from quarter_hour.snapshots import Snapshots
from quarter_hour.stages import Session, Stage

SAY = '''
import json, os, signal, sys, time
def say(name, outcome="ok"):
    with open(sys.argv[-1], "a") as file:
        file.write(json.dumps({{"name": name, "outcome": outcome}}) + "\\\\n")
'''

def stage(name, code, findings=(), **limits):
    def command(pending, left):
        return [sys.executable, "-c", SAY + code, *pending]
    return Stage(name, command, findings, **limits)

out, results = Path("out"), Path("results")
for folder in (out, results, Path("cache")):
    folder.mkdir()
adopt_orphans()
journal = Journal(out / "findings.jsonl", 7)
session = Session(journal, results, Path.cwd(), {{}}, time.monotonic() + {seconds}, Path("cache"))
snapshots = Snapshots(results, out / "part.tar.gz", 0.1)
{before}
try:
    run([{stages}], [{beside}], session)
finally:
    snapshots.finish()
"""


def driver(stages: str, seconds: float = 120, beside: str = "", before: str = "") -> list[str]:
    return [sys.executable, "-c", DRIVER.format(stages=stages, seconds=seconds, beside=beside, before=before)]


def started(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": python_path(ROOT, BENCHMARKS)}
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True)


def found(
    folder: Path, stages: str, seconds: float = 120, beside: str = "", before: str = ""
) -> dict[str, dict[str, Any]]:
    """Findings of these stages by name, which are the same in the file and on the terminal."""
    process = started(folder, driver(stages, seconds, beside, before))
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines == read_lines(folder / "out" / "findings.jsonl")[0]
    assert all(line["part"] == 7 for line in lines)
    return {line["name"]: line for line in lines}


def outcomes(findings: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: finding["outcome"] for name, finding in findings.items()}


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


def test_an_interruption_ends_all_and_packs_once_more(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.quarter_hour", "1", "--dry-run", "--out", str(out)]
    process = started(ROOT, [*command, "--work", str(tmp_path / "work")])
    assert process.stdout is not None and "unpack: kernels" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode != 0
    lines = read_lines(out / "findings.jsonl")[0]
    findings = {line["name"]: line for line in lines}
    for stage in ("machine", "smoke", "topics"):
        assert (findings[stage]["outcome"], findings[stage]["reason"]) == ("skipped", "interrupted")
    last = lines[-1]
    assert (last["name"], last["outcome"], last["reason"]) == ("part", "failed", "interrupted")
    counted = Counter(line["outcome"] for line in lines[:-1])
    assert last["figures"] == {outcome: counted[outcome] for outcome in ("ok", "failed", "skipped")}
    with tarfile.open(out / "part-1.tar.gz") as tar:
        assert "unpack.log" in tar.getnames()


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


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf", "soon"])
def test_seconds_are_more_than_none(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _parse(["1", "--seconds", seconds])
    assert f"argument --seconds: {seconds!r} is no number of seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--work"])
def test_a_folder_that_cannot_be_made_is_named(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    usable = {"--out": tmp_path / "out", "--work": tmp_path / "work"}
    for wrong in (file, file / "below"):
        arguments = [str(word) for item in {**usable, option: wrong}.items() for word in item]
        with pytest.raises(SystemExit, match="2"):
            main(["1", *arguments])
        assert f"{option} {wrong}: no such folder can be made" in capsys.readouterr().err


def test_a_part_that_has_found_nothing_is_skipped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quarter_hour", "2", "--dry-run", "--seconds", "2.6"]
    process = started(ROOT, [*command, "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    process.communicate(timeout=TIMEOUT_SECONDS)
    lines = read_lines(tmp_path / "findings.jsonl")[0]
    assert {line["outcome"] for line in lines} == {"skipped"} and process.returncode == 1
    assert lines[-1]["figures"] == {"ok": 0, "failed": 0, "skipped": len(lines) - 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("dry", "outcome"), [([], "failed"), (["--dry-run"], "ok")])
def test_a_machine_without_a_gpu_fails_its_checks(dry: list[str], outcome: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert checks.main([*dry, "device", "tbe", "--findings", str(file)]) == 0
    records = {record["name"]: record for record in read_lines(file)[0]}
    assert outcomes(records) == {"device": outcome, "tbe": outcome}
    if not dry:
        assert all("finds no GPU" in record["reason"] for record in records.values())


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


def test_what_was_on_the_path_stays_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/given")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/other/ptxas")
    variables = environment(tmp_path)
    unpacked = [str(tmp_path / "libraries"), str(tmp_path / "wheels")]
    assert variables["PYTHONPATH"].split(os.pathsep) == [*unpacked, str(ROOT), str(BENCHMARKS), "/given"]
    assert "TRITON_PTXAS_PATH" not in variables


TESTS = """
import pytest
@pytest.mark.parametrize("number", [1, 2, 3])
def test_first(number): assert number > 1
def test_second(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not here")
def test_third(): pass
"""


def test_tests_are_reported_as_they_end(tmp_path: Path) -> None:
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "quarter_hour.pytest_findings", "-p", "no:cacheprovider"]
    process = started(tmp_path, [*command, "--each-test", "2", "--findings", "lines.jsonl"])
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1, output
    records = {record["name"]: record for record in read_lines(tmp_path / "lines.jsonl")[0]}
    assert outcomes(records) == {
        f"test_{file}.py::test_{name}": outcome
        for file in "ab"
        for name, outcome in {"first[2]": "ok", "first[3]": "ok", "second": "failed", "third": "skipped"}.items()
    }
    assert "one is not two" in records["test_a.py::test_second"]["reason"]
    assert "not here" in records["test_a.py::test_third"]["reason"]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "worker"])
def test_a_module_that_cannot_be_imported_is_a_finding(workers: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module")
    (tmp_path / "test_b.py").write_text("import pytest; pytest.skip('not here', allow_module_level=True)")
    (tmp_path / "test_c.py").write_text("def test_one(): pass")
    records = records_of(tmp_path, workers)
    assert outcomes(records) == {"test_a.py": "failed", "test_b.py": "skipped", "test_c.py::test_one": "ok"}
    assert "no_such_module" in records["test_a.py"]["reason"]
    assert "not here" in records["test_b.py"]["reason"]


def records_of(folder: Path, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """First findings by name of the tests in ``folder``, run as a stage runs them."""
    command = parts._tests("name", arguments, 60).command((), 60.0)
    process = started(folder, [*command, "--findings", "lines.jsonl"])
    process.communicate(timeout=TIMEOUT_SECONDS)
    records = read_lines(folder / "lines.jsonl")[0]
    return {record["name"]: record for record in reversed(records)}


BREAKS = """
import os, sys, types
class Cuda:
    broken = False
    def is_initialized(self): return True
    def synchronize(self):
        if self.broken: raise RuntimeError("an illegal memory access was encountered")
cuda = Cuda()
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
def test_first(): assert 1 == 2, "one is not two"
def test_second():
    assert os.environ["PYTEST_XDIST_WORKER"] == "gw0", "nothing was wrong with the worker of the first"
    cuda.broken = True
    raise RuntimeError("illegal access of the second")
def test_third(): cuda.synchronize()
def test_fourth(): cuda.synchronize()
"""


def test_a_worker_whose_gpu_is_broken_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(BREAKS)
    records = records_of(tmp_path, ["-n", "1"])
    assert outcomes(records) == {
        "test_a.py::test_first": "failed", "test_a.py::test_second": "failed", "test_a.py::test_third": "ok",
        "test_a.py::test_fourth": "ok",
    }  # fmt: skip
    assert "illegal access of the second" in records["test_a.py::test_second"]["reason"]


def test_all_kernels_are_tried_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = parts.Place(bundle=tmp_path, work=tmp_path, results=tmp_path, dry=False)
    (smoke,) = (stage for stage in parts.stages(1, place) if stage.name == "smoke")
    files = [word for word in smoke.command((), 60.0) if word.startswith("tests/kernels/test_triton_")]
    assert "tests/kernels/test_triton_table.py" in files and all((ROOT / file).is_file() for file in files)


def test_after_a_crash_the_cpu_engine_is_compiled_for_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived = []
    monkeypatch.setattr(life, "live", lambda case, scale: lived.append(case.optimizer))
    assert warm.main(["adagrad", "rowwise_adagrad", "--findings", str(tmp_path / "lines.jsonl")]) == 0
    assert lived == [OptimizerKind.ADAGRAD, OptimizerKind.ROWWISE_ADAGRAD]
    assert [line["name"] for line in read_lines(tmp_path / "lines.jsonl")[0]] == ["adagrad", "rowwise_adagrad"]


@pytest.mark.parametrize(("absent", "needed"), [("rich", True), ("hypothesis", True), ("pyarrow", False)])
def test_what_the_stages_need_must_be_there(absent: str, needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> ModuleType:
        if name == absent:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return ModuleType(name)

    monkeypatch.setattr(checks.importlib, "import_module", imported)
    with pytest.raises(ImportError, match=f"No module named '{absent}'") if needed else contextlib.nullcontext():
        versions = checks.imports()
        assert absent in versions and "torchmetrics.functional" in versions


PROFILED = """==PROF== Connected to process 7
==PROF== Disconnected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_update_kernel","gpu__time_duration.sum","us","700.1"
"0","7","_update_kernel","launch__waves_per_multiprocessor","","1.00"
"1","7","_update_kernel","gpu__time_duration.sum","us","563.2"
"1","7","_update_kernel","launch__registers_per_thread","register/thread","64"
"1","7","_update_kernel","launch__waves_per_multiprocessor","","4.00"
"""


def test_the_profilers_table_is_read() -> None:
    """The last launch: the first one loads."""
    assert figures_of(PROFILED) == {"time": "563.2 us", "waves": "4.00", "registers": "64 register/thread"}
    with pytest.raises(ValueError, match="has profiled nothing: ==ERROR== no counters"):
        figures_of("==ERROR== no counters")


EXPECTED = {
    1: {"tbe: tbe", "machine: device", "smoke", *(f"topics: {name}" for name in ("step", "kernels", "dedup"))},
    2: {"engines", "parity"},
    3: {"residency: adam", "residency: sgd", "more-topics: table", "more-topics: model"},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", sorted(EXPECTED))
def test_a_dry_run(part: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.quarter_hour", str(part), "--dry-run", "--seconds", "250"]
    process = started(ROOT, [*command, "--out", str(out), "--work", str(tmp_path / "work")])
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, output[-4000:]
    findings = outcomes({line["name"]: line for line in read_lines(out / "findings.jsonl")[0]})
    assert {name for name, outcome in findings.items() if outcome == "ok"} >= EXPECTED[part], findings
    assert findings["part"] == "ok"
    assert sorted(file.name for file in out.iterdir()) == ["findings.jsonl", f"part-{part}.tar.gz"]
