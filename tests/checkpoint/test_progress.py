"""What rank 0 shows while a checkpoint is written or read, and that nobody else shows anything."""

from __future__ import annotations

import pytest

from dynamicemb.checkpoint.progress import progress


def _shown(shown: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    with progress("dump", 1000, shown) as report:
        report.table("item")
        report.advance(400)
        report.advance(600)
    output = capsys.readouterr()
    assert output.out == "", "stdout belongs to results"
    return output.err


def test_rank_0_shows_rows_per_second_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _shown(True, True, monkeypatch, capsys)
    assert "dump" in text and "item" in text and "rows/s" in text and ":" in text and "100%" in text


@pytest.mark.parametrize(("shown", "terminal"), [(False, True), (True, False)])
def test_others_and_logs_show_nothing(
    shown: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _shown(shown, terminal, monkeypatch, capsys).strip() == ""
