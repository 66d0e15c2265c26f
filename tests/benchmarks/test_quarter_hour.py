"""The command of the quarter of an hour, what it takes, its parts and checks."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from quarter_hour import checks, parts, warm
from quarter_hour.__main__ import _parse, environment, main
from quarter_hour.journal import read_lines
from quarter_hour.waves import figures_of

from dynamicemb.kernels.layout import OptimizerKind
from tests.benchmarks.conftest import BENCHMARKS
from tests.benchmarks.staged import ROOT, outcomes, started
from tests.gpu import life
from tests.processes import TIMEOUT_SECONDS


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


def test_what_was_on_the_path_stays_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/given")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/other/ptxas")
    variables = environment(tmp_path)
    unpacked = [str(tmp_path / "libraries"), str(tmp_path / "wheels")]
    assert variables["PYTHONPATH"].split(os.pathsep) == [*unpacked, str(ROOT), str(BENCHMARKS), "/given"]
    assert "TRITON_PTXAS_PATH" not in variables


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
