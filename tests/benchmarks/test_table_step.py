from __future__ import annotations

import pytest
import table_step
from figures import CheckError

from dynamicemb.kernels.layout import OptimizerKind

TINY = table_step.Size(rows=3_000, dim=8, ids=500, rounds=2, warm_up=1)


def test_compares_both_optimizers_that_fbgemm_has() -> None:
    findings = table_step.measure(TINY)
    targets = [figure.name for figure in findings.figures if figure.target is not None]
    of_each = ("fbgemm's time / ours", "forward, ours / fbgemm's")
    assert targets == [
        *(f"{name}: {figure}" for name in ("row-wise Adagrad", "SGD") for figure in of_each),
        *(f"evaluation, 0 % of the ids absent: {name} / zeros" for name in ("uniform", "normal")),
    ]
    assert "Adam: step" in {figure.name for figure in findings.figures}
    assert all(figure.measured.median > 0 for figure in findings.figures)
    assert {len(values) for values in findings.series.values()} == {TINY.rounds}


def test_reports_nothing_when_the_sides_start_from_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    read = table_step.DynamicTable.read
    monkeypatch.setattr(table_step.DynamicTable, "read", lambda table, ids: read(table, ids) + 1e-3)
    with pytest.raises(CheckError, match=r"rows of step 0 differ from fbgemm's by up to 0\.001"):
        table_step.measure(TINY)


def test_reports_nothing_when_the_sides_learn_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    make_table = table_step._fbgemm_table
    monkeypatch.setattr(table_step, "_fbgemm_table", lambda size, kind: make_table(size, OptimizerKind.SGD))
    with pytest.raises(CheckError, match="rows of step 1 differ from fbgemm's"):
        table_step.measure(TINY)


def test_reports_nothing_when_absent_ids_do_not_read_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table_step.EVALUATION_INITIALIZERS, "normal", None)
    with pytest.raises(CheckError, match="absent ids do not read as the initializer says: normal"):
        table_step.measure(TINY)
