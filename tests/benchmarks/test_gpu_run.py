"""The command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import run_gpu
import torch
from figures import CheckError, Figure, Findings, Published, Spread, Target
from gpu.topic import Case, Context, Measured, Outcome, Topic
from host import Accelerator

from tests.benchmarks.pretended import PretendedGpu


class PretendedH200(PretendedGpu):
    def facts(self) -> Accelerator:
        return Accelerator("NVIDIA H200", "580.1", "13.0", 140.4, 139.8, 132, 60.0)


def _topic(context: Context) -> Topic:
    def run(deadline: float) -> Measured:
        figure = Figure(
            "find", "G keys/s", Spread.of([7.0, 8.0]), 9.0, "bytes", Target(7.0, at_least=True), 2e9, 0.81,
            Published(1.97, "others"),
        )  # fmt: skip
        return Measured([figure, Figure("other", "ms", Spread.exact(1.0))], {"find, s": [1.0, 2.0]})

    return Topic("dedup", "Title", "Setup.", "Check.", [Case("fits", run, 0), Case("slow", run, 1e6)])


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.dedup.topic", _topic)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("_short")
def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_gpu, "HERE", tmp_path)
    assert run_gpu.main(["--dry-run", "--only", "dedup"]) == 0
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "copy, read + written" in shown and "not measured: slow: out of time" in shown


@pytest.mark.usefixtures("_short")
def test_each_topic_has_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.ceilings.FULL", run_gpu.importlib.import_module("gpu.ceilings").DRY)
    assert run_gpu.main(["--only", "dedup", "--output", str(tmp_path)], PretendedH200()) == 0
    stems = sorted(path.name for path in tmp_path.iterdir())
    assert [re.sub(r"\d{4}-\d\d-\d\d", "DATE", name) for name in stems] == [
        "ceilings-nvidia-h200-DATE.json",
        "ceilings-nvidia-h200-DATE.md",
        "dedup-nvidia-h200-DATE.json",
        "dedup-nvidia-h200-DATE.md",
    ]
    data = json.loads((tmp_path / stems[2]).read_text())
    assert data["accelerator"]["driver"] == "580.1" and data["host"]["versions"]["torch"]
    figure = data["findings"][0]["figures"][0]
    assert figure["met"] is True and figure["copy_share"] == 0.81 and figure["published"]["value"] == 1.97
    assert "out of time" in data["findings"][0]["left_out"]["slow"]
    text = (tmp_path / stems[3]).read_text()
    assert "NVIDIA H200, 140.4 GiB of which 139.8 were free" in text and "driver 580.1, CUDA 13.0" in text
    assert "| find | G keys/s | 7.50 | 7.10 to 7.90 | 9 | ≥ 7 | yes | 2 GB | 81% | 1.97 (others) | bytes |" in text
    assert "- slow: out of time: 1000000 s needed" in text


@pytest.mark.parametrize(
    ("error", "said"),
    [(CheckError("ids differ"), "case: ids differ"), (None, "it could not be set up: KeyError: 'topic'")],
)
def test_what_is_not_reported_is_named_and_changes_the_status(
    error: Exception | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def topic(context: Context) -> Topic:
        def run(deadline: float) -> Measured:
            assert error is not None
            raise error

        if error is None:
            raise KeyError("topic")
        return Topic("dedup", "Title", "Setup.", "Check.", [Case("case", run, 0)])

    monkeypatch.setattr("gpu.dedup.topic", topic)
    assert run_gpu.main(["--dry-run", "--only", "dedup", "--output", str(tmp_path)], PretendedGpu()) == 1
    (file,) = tmp_path.glob("dedup-*.md")
    assert f"Not reported: {said}" in file.read_text()


@pytest.mark.parametrize("noticed", [True, False])
def test_a_lost_device_ends_the_run_with_a_status_of_its_own(
    noticed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a case has waited for the work that lost it or not."""

    class Losing(PretendedGpu):
        lost = False

        def synchronize(self) -> None:
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

        def free_bytes(self) -> int:
            self.synchronize()
            return super().free_bytes()

    device = Losing()

    def topic(context: Context) -> Topic:
        def run(deadline: float) -> Measured:
            device.lost = True
            if noticed:
                device.synchronize()
            return Measured([Figure("time", "ms", Spread.exact(1.0))])

        whole = Case("whole", lambda deadline: Measured([Figure("before", "ms", Spread.exact(2.0))]), 0)
        return Topic("dedup", "Title", "Setup.", "Check.", [whole, Case("losing", run, 0)])

    def never(context: Context) -> Topic:
        raise AssertionError("the device is lost")

    monkeypatch.setattr("gpu.dedup.topic", topic)
    monkeypatch.setattr("gpu.model.topic", never)
    file = tmp_path / "lines.jsonl"
    arguments = ["--dry-run", "--only", "dedup", "--only", "model", "--output", str(tmp_path / "results")]
    assert run_gpu.main([*arguments, "--findings", str(file)], device) == 75
    lines = {line["name"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert list(lines) == ["ceilings", "dedup"]
    assert lines["dedup"]["outcome"] == "failed" and lines["dedup"]["figures"]["before"]["median"] == 2.0
    assert "lost: RuntimeError: CUDA error: an illegal memory access was encountered" in lines["dedup"]["reason"]
    assert len([*(tmp_path / "results").glob("dedup-*")]) == 2


def test_time_that_one_topic_leaves_belongs_to_the_next() -> None:
    deadlines = run_gpu.deadlines(list(run_gpu.SHARES), 100.0, 450.0)
    assert deadlines["ceilings"] == pytest.approx(100 + run_gpu.SHARES["ceilings"])
    assert deadlines["breakdown"] == 550.0
    assert sum(run_gpu.SHARES.values()) == run_gpu.SECONDS
    assert run_gpu.deadlines(["step"], 100.0, 450.0) == {"step": 550.0}


@pytest.mark.parametrize("seconds", [30.0, 60.0, 85.0, 133.0, 288.0])
def test_the_step_is_whole_before_others_begin(seconds: float) -> None:
    """If there is time for its two cases, 20 seconds each, whatever its share is."""
    deadlines = run_gpu.deadlines(["ceilings", "step", "kernels", "dedup", "breakdown"], 0.0, seconds)
    assert deadlines["step"] >= min(seconds, deadlines["ceilings"] + 60.0)
    assert list(deadlines.values()) == sorted(deadlines.values()) and max(deadlines.values()) == seconds


def test_a_topic_of_which_nothing_ran_is_skipped() -> None:
    nothing = Findings("step", "title", "setup", "check", [], {}, {"SGD": "out of time"})
    assert run_gpu._line(Outcome(nothing), "") == {"outcome": "skipped", "figures": {}, "reason": "SGD: out of time"}
    some = dataclasses.replace(nothing, figures=[Figure("time", "ms", Spread.exact(1.0))])
    assert run_gpu._line(Outcome(some), "")["outcome"] == "ok"
    assert run_gpu._line(Outcome(nothing, errors={"SGD": "traceback"}), "")["outcome"] == "failed"


def test_findings_without_bytes_keep_their_columns() -> None:
    from output import _extra_columns

    plain = [Figure("time", "ms", Spread.exact(1.0))]
    assert _extra_columns(Findings("name", "title", "setup", "check", plain).figures) == ()
