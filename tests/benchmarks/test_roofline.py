"""The predictions of docs/performance.md: up to date, and what the arithmetic on paper gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import roofline
from gpu.traffic import SortWork, Traffic

from dynamicemb.kernels.layout import OptimizerKind


def test_the_page_shows_what_the_script_prints() -> None:
    page = roofline.PAGE.read_text()
    assert roofline.rewritten(page) == page, "run: python benchmarks/roofline.py --write"


def test_a_kernel_takes_what_its_parts_take() -> None:
    device = roofline.Device("toy", 1e12, 1e9, 1e-5, 1e-6)
    work = Traffic(2e6, {32: 3000, 128: 1e4}, (SortWork(1000, 4, 8),))
    # 2 MB and 1.28 MB at 1 TB/s, 3000 reads at 1 G/s, four passes, one launch.
    assert device.seconds(work) == pytest.approx(2e-6 + 1.28e-6 + 3e-6 + 4e-5 + 1e-6)


@pytest.mark.parametrize(("kind", "row_bytes"), [(OptimizerKind.SGD, 512), (OptimizerKind.ADAM, 1536)])
def test_rows_and_gradients_by_hand(kind: OptimizerKind, row_bytes: int) -> None:
    work = {row.kernel: row.work for row in roofline.step_rows(kind)}
    ids, unique = 1_048_570, 350_000
    assert work["_gather_kernel"].num_bytes == pytest.approx(ids * (512 + 8) + unique * (512 + 8))
    rows = ids * 512 + unique * 2 * row_bytes
    assert work["_update_kernel"].num_bytes == pytest.approx(rows + ids * 8 + unique * (8 + 8 + 4))


def test_an_evaluation_with_an_initializer_costs_little_more_than_with_zeros() -> None:
    find, gather, missing = (row.work.num_bytes for row in roofline.evaluation_rows())
    assert (find + gather + missing) / (find + gather) < 1.1
    find, gather, missing = (roofline.H200.seconds(row.work) for row in roofline.evaluation_rows())
    assert (find + gather + missing) / (find + gather) < 1.1


def test_measured_times_stand_beside_the_predictions(tmp_path: Path) -> None:
    figures = [
        {"name": "SGD, dynamic step: _gather_kernel", "unit": "µs", "measured": {"median": 345.6}},
        {"name": "SGD, TBE step: _gather_kernel", "unit": "µs", "measured": {"median": 1.0}},
        {
            "name": "SGD, dynamic with an initializer, evaluation: _gather_kernel",
            "unit": "µs",
            "measured": {"median": 234.5},
        },
    ]
    for date, scale in (("2026-01-02", 1), ("2025-12-31", 100)):
        scaled = [{**figure, "measured": {"median": scale * figure["measured"]["median"]}} for figure in figures]  # type: ignore[index]
        file = tmp_path / f"breakdown-nvidia-h200-{date}.json"
        file.write_text(json.dumps({"findings": [{"figures": scaled}]}))
    assert roofline.measured_microseconds(OptimizerKind.SGD, tmp_path) == {"_gather_kernel": 345.6}
    lines = [line for line in roofline.document(results=tmp_path).splitlines() if line.startswith("| gather")]
    # SGD's table, Adam's, and the evaluation's.
    assert "| 346 |" in lines[0] and "not measured" in lines[1] and "| 234 |" in lines[2]
