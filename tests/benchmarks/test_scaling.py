from __future__ import annotations

import numpy as np
import pages
import pytest
import scaling
from figures import CheckError

TINY = scaling.Size((500, 2_000), dim=8, ids=400, rounds=2, repetitions=2, growth_rows=2_000, growth_doublings=2)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.PageCosts.measured, "__defaults__", (8 * pages.HUGE_PAGE_BYTES,))


@pytest.mark.slow
def test_finds_what_grows_and_what_it_costs() -> None:
    findings = scaling.measure(TINY)
    names = [figure.name for figure in findings.figures]
    assert sum(name.startswith("growth to ") for name in names) == 2
    phases = [
        figure
        for figure in findings.figures
        if figure.name.startswith("500 rows: filling, ") and figure.unit == "ns/row"
    ]
    assert [figure.name.rpartition(", ")[2] for figure in phases] == [*scaling.PHASES.values()]
    assert all(figure.measured.median > 0 for figure in phases)
    assert [figure.name for figure in findings.figures if figure.target] == [
        "2,000 rows: filling / what memory says",
        "filling: exponent e of time ~ rows**e",
        "filling: worst step / trend",
        "growing: worst step without growth / trend",
    ]
    assert len(findings.series["growing, ms by step"]) == 5


@pytest.mark.slow
def test_reports_nothing_when_a_table_grows_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROWTH_LOGGER", "nobody")
    with pytest.raises(CheckError, match="2 doublings, 0 of them announced"):
        scaling.measure(TINY)


def test_trend_leaves_out_the_step_itself_and_special_ones() -> None:
    seconds = np.array([1.0, 1.0, 9.0, 1.0, 5.0, 1.0])
    ordinary = np.array([True, True, False, True, True, True])
    assert scaling.trend(seconds, ordinary).tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert scaling._worst_over_trend(seconds, ordinary) == 5.0


def test_first_and_last_steps_do_not_count() -> None:
    assert scaling._worst_over_trend(np.array([7.0, 1.0, 1.0, 8.0]), np.ones(4, dtype=bool)) < 1.0
