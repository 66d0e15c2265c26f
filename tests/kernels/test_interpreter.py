"""Runs the tests of the Triton engine in Triton's interpreter, in a process of its own; see :mod:`triton_host`."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dynamicemb.kernels.engine import ENGINE_VARIABLE
from tests.interpreter import needs_interpreter
from tests.processes import TIMEOUT_SECONDS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Modules that are no slower there than others are compiled.
FAST = (
    "test_triton_fill",
    "test_triton_gather",
    "test_triton_hashing",
    "test_triton_note",
    "test_triton_repeat",
    "test_triton_tally",
)
MODULES = sorted(path.stem for path in HERE.glob("test_triton_*.py"))

pytestmark = [
    needs_interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this process is Triton's interpreter already"
    ),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[ElementTree.Element]:
    """The test cases of all modules that this run asks for, as the interpreter's process reported them."""
    wanted = {item.callspec.params["module"] for item in request.session.items if item.module is request.module}
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop(ENGINE_VARIABLE, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [str(HERE / f"{module}.py") for module in MODULES if module in wanted]
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert process.returncode in (0, 1), f"{process.stdout[-4000:]}\n{process.stderr[-4000:]}"
    return list(ElementTree.parse(report).iter("testcase"))


@pytest.mark.parametrize(
    "module", [module if module in FAST else pytest.param(module, marks=pytest.mark.slow) for module in MODULES]
)
def test_module(module: str, outcomes: list[ElementTree.Element]) -> None:
    cases = [case for case in outcomes if case.get("classname", "").endswith(module)]
    problems = {
        case.get("name"): problem.text
        for case in cases
        for kind in ("failure", "error", "skipped")
        for problem in case.iter(kind)
    }
    report = "\n\n".join(f"{name}\n{text}" for name, text in problems.items())
    assert cases, f"{module} has run no test"
    assert not problems, f"{len(problems)} of {len(cases)} tests failed in the interpreter:\n{report}"
