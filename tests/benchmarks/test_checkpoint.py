from __future__ import annotations

import checkpoint
import pytest

TINY = checkpoint.Size(rows=3_000, dim=8, ids=500, touched=0.1, rounds=2, warm_up=1)


@pytest.mark.slow
def test_compares_with_plain_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    findings = checkpoint.measure(TINY)
    times = {figure.name.split(":")[0]: figure for figure in findings.figures}
    assert {"dump", "plain write", "load", "plain read", "delta"} <= set(times)
    assert all(figure.measured.median > 0 for figure in findings.figures)
    assert times["speed of a dump / plain write"].target is not None
    assert 0.1 <= times["delta / dump, bytes"].measured.median < 0.3
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
