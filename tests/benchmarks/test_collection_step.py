from __future__ import annotations

import collection_step
import pytest

TINY = collection_step.Size(tables=(2,), rows=1_600, dim=8, ids=256, rounds=2, warm_up=1)


@pytest.mark.slow
def test_compares_both_collections_on_two_ranks() -> None:
    findings = collection_step.measure(TINY)
    *times, ratio = findings.figures
    assert ratio.name == "2 tables: dynamic / TorchRec" and ratio.target is not None
    assert ratio.measured.samples == TINY.rounds
    assert all(figure.unit == "ms" and figure.measured.median > 0 for figure in times)
