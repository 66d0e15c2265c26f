from __future__ import annotations

import collection_step
import pytest

CASES = {
    "2 ranks, 2 tables of 128 ids": collection_step.Case(2, 2, 256),
    "one rank, one table of 64 ids": collection_step.Case(1, 1, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compares_both_collections(name: str) -> None:
    tiny = collection_step.Size((CASES[name],), rows=1_600, dim=8, rounds=2, warm_up=1)
    findings = collection_step.measure(tiny)
    *times, ratio = findings.figures
    assert ratio.name == f"{name}: dynamic / TorchRec" and ratio.target is not None
    assert ratio.measured.samples == tiny.rounds
    assert all(figure.unit == "ms" and figure.measured.median > 0 for figure in times)
