from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import run
from figures import CheckError, Figure, Findings, Spread, Target

MEASURED = Findings(
    name="memory",
    title="Memory",
    setup="One table.",
    check="Full.",
    figures=[
        Figure("peak", "×", Spread.of([1.0, 1.1, 1.3]), 1.05, "arithmetic", Target(1.2, at_least=False)),
        Figure("rows | metadata", "MiB", Spread.exact(1234.5)),
    ],
    series={"by step": [1.0, 1.1]},
)


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory.measure", lambda size: MEASURED)


@pytest.mark.usefixtures("_measured")
def test_writes_both_files_named_after_topic_machine_and_date(tmp_path: Path) -> None:
    assert run.main(["--only", "memory", "--output", str(tmp_path)]) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [re.sub(r"-\d{4}-\d\d-\d\d", "-DATE", name).rpartition("core")[2] for name in files] == [
        "-DATE.json",
        "-DATE.md",
    ]
    assert all(re.fullmatch(r"memory-[a-z0-9-]+-\d+core-\d{4}-\d\d-\d\d\.(json|md)", name) for name in files)
    data = json.loads((tmp_path / files[0]).read_text())
    assert data["findings"][0]["figures"][0]["met"] is True
    assert data["findings"][0]["figures"][0]["measured"]["samples"] == 3
    assert set(data["seconds"]) == set(data["other_cores"]) == {"memory"}
    assert data["host"]["versions"]["torch"] and data["host"]["cpu"]
    text = (tmp_path / files[1]).read_text()
    assert "| peak | × | 1.10 | 1.02 to 1.26 | 1.05 | ≤ 1.2 | yes | arithmetic |" in text
    assert "| rows \\| metadata | MiB | 1,234 |" in text or "| rows \\| metadata | MiB | 1,235 |" in text


@pytest.mark.usefixtures("_measured")
def test_quick_runs_judge_nothing_and_write_where_they_are_told_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "HERE", tmp_path / "benchmarks")
    assert run.main(["--quick", "--only", "memory"]) == 0
    assert not list(tmp_path.rglob("*.json"))
    assert run.main(["--quick", "--only", "memory", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("quick-memory-*.json")
    assert json.loads(file.read_text())["findings"][0]["figures"][0]["met"] is None


def test_a_failed_check_is_reported_instead_of_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(size: object) -> Findings:
        raise CheckError("rows differ")

    monkeypatch.setattr("memory.measure", differs)
    assert run.main(["--only", "memory", "--output", str(tmp_path)]) == 1
    assert "memory: not reported, the check failed: rows differ" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.md")
    assert "Not reported: rows differ" in file.read_text()


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "nothing"])
    assert "table_step" in capsys.readouterr().err
