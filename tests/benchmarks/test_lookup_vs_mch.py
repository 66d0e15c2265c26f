from __future__ import annotations

import lookup_vs_mch
import pytest
import torch
from figures import CheckError

TINY = lookup_vs_mch.Size(rows=2_000, dim=8, ids=300, rounds=4, warm_up=1, intervals=(1, 2))


def test_compares_lookups_for_each_interval() -> None:
    findings = lookup_vs_mch.measure(TINY)
    samples = {figure.name: figure.measured.samples for figure in findings.figures}
    assert samples == {
        "dynamic table": 4,
        "MCH, eviction interval 1": 4,
        "MCH, eviction interval 1: its time / ours": 4,
        "MCH, eviction interval 2": 2,
        "MCH, eviction interval 2: its time / ours": 2,
    }
    assert [figure.name for figure in findings.figures if figure.target] == [
        "MCH, eviction interval 1: its time / ours"
    ]


def test_reports_nothing_when_ids_share_a_row() -> None:
    table = lookup_vs_mch.MchTable(TINY, eviction_interval=1)
    ids = torch.arange(1, TINY.rows + 1)
    table.train(ids)
    with pytest.raises(CheckError, match="two ids share a row"):
        table.take_rows(ids + 5, torch.zeros(TINY.rows, TINY.dim))  # five of them have no row
