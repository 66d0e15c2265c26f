from __future__ import annotations

import memory
import pytest
from figures import CheckError

TINY = memory.Size(capacity=2**14, dim=16, ids=512, doublings=1)


@pytest.mark.slow
def test_measures_a_table_of_each_kind() -> None:
    findings = memory.measure(TINY)
    medians = {figure.name: figure.measured.median for figure in findings.figures}
    for kind in ("allocated at once", "grown"):
        assert medians[f"{kind}: metadata per slot"] == 17.0
        assert medians[f"{kind}: padding per slot"] == 12
        assert medians[f"{kind}: rows + metadata"] == round(2**14 * (16 * 4 + 16 + 17) / 2**20, 1)
        assert medians[f"{kind}: peak / (rows + metadata), full"] > 0
    assert "grown: peak / (rows + metadata), worst step" in medians


def test_reports_nothing_about_a_table_that_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    nearly = memory.Footprint(1000, 96, 12, 113_000, 17_000, 1048, 900, 0, [1.0], 113_000)
    monkeypatch.setattr(memory, "in_fresh_process", lambda *arguments: nearly)
    with pytest.raises(CheckError, match="900 of 1000 slots hold a row"):
        memory.measure(memory.Size(capacity=1000, dim=16, ids=10))
