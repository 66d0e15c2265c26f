"""The parts of ``make matrix`` that need no package index: what a stack is asked for, and what its row says."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import pytest

from dynamicemb.installation import FBGEMM_BY_TORCH
from tests import matrix

PAGE = f"before\n{matrix.BEGIN}\n{matrix.END}\nafter\n"


def row(torch: str, torchrec: str, outcome: str) -> list[str]:
    return ["3.11.7", torch, "1.8.0", torchrec, "3.7.1", "0.68.1", "2.4.6", outcome, "2026-01-02"]


def rows(page: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 3.")]


def test_every_pair_that_is_said_to_fit_is_tried() -> None:
    tried = {(stack.torch.rpartition(".")[0], stack.fbgemm.rpartition(".")[0]) for stack in matrix.STACKS}
    assert set(FBGEMM_BY_TORCH.items()) <= tried
    assert len({stack.name for stack in matrix.STACKS}) == len(matrix.STACKS)


def test_what_a_stack_does_not_say_comes_from_the_project() -> None:
    others = matrix._other_requirements()
    names = [text.partition(">")[0].partition("=")[0] for text in others]
    assert {"rich", "typer", "tensordict", "torchmetrics", "hypothesis", "pytest-xdist", "pyarrow"} <= set(names)
    assert not set(names) & {*matrix.PACKAGES, "dynamicemb", "fbgemm-gpu"}


def test_a_row_is_added_in_order_and_replaced() -> None:
    page = PAGE
    for new in (
        row("2.13.0", "1.10.0", "3 passed"), row("2.9.0", "1.8.0", "1 failed"), row("2.13.0", "1.9.2", "5 passed"),
        row("2.9.0", "1.8.0", "2 passed"),
    ):  # fmt: skip
        page = matrix.with_row(page, new)
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert [(cells[1], cells[3], cells[7]) for cells in rows(page)] == [
        ("2.9.0", "1.8.0", "2 passed"), ("2.13.0", "1.9.2", "5 passed"), ("2.13.0", "1.10.0", "3 passed"),
    ]  # fmt: skip


def test_a_reason_with_a_bar_stays_one_cell() -> None:
    assert rows(matrix.with_row(PAGE, row("2.9.0", "1.8.0", "not run: a | b")))[0][7] == "not run: a / b"


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ("<testcase/><testcase/><testcase><skipped/></testcase>", "2 passed, 1 skipped"),
        (
            '<testcase/><testcase classname="tests.a.test_b" name="test_c[1]"><failure/></testcase>'
            '<testcase classname="tests.d" name="e"><error/></testcase>',
            "2 failed, 1 passed: `a.test_b.test_c[1]`, `d.e`",
        ),
        (
            '<testcase classname="t" name="f"><failure/></testcase>' * (matrix.NAMED_FAILURES + 1),
            f"6 failed: {', '.join(['`t.f`'] * matrix.NAMED_FAILURES)}, ...",
        ),
    ],
)
def test_the_outcome_of_a_report(cases: str, expected: str) -> None:
    report = ElementTree.parse(io.StringIO(f"<testsuites><testsuite>{cases}</testsuite></testsuites>"))
    assert matrix.outcome(report) == expected


def test_what_pip_says_last_is_the_reason() -> None:
    text = "Collecting x\nERROR: No matching distribution found for torch==9\n\n[notice] a new release of pip\n"
    assert matrix._last_line(text) == "ERROR: No matching distribution found for torch==9"
    text = "Traceback\n  File\na.b.SomeError: x 1.0 cannot be loaded (/home/me/x.so: undefined symbol: y); run: pip\n"
    assert matrix._last_line(text) == "a.b.SomeError: x 1.0 cannot be loaded (x.so: undefined symbol: y)"


def test_a_version_that_does_not_exist_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stack: matrix.Stack, folder: object) -> None:
        raise matrix.NotRunError("ERROR: no torch 9")

    monkeypatch.setattr(matrix, "_install", refuse)
    found = matrix.tried(matrix.Stack("9.0", "1.0", "1.6.1", "3.6.0"), keep=False, workers="1")
    assert found[1:8] == ["9.0", "1.0", "1.6.1", "3.6.0", "0.68.1", "2.4.6", "not run: ERROR: no torch 9"]
