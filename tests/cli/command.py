"""The command for tests: in this process, which is quick, or in one of its own, as a user runs it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from dynamicemb.cli import main, model
from tests.processes import C10D_ERRORS_ONLY, TIMEOUT_SECONDS, python_path, torchrun

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """How the command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its one JSON document; nothing else may be on stdout. NaN and the like are no JSON."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def dynamicemb(*arguments: object, columns: int = 80) -> Result:
    """Runs the command in this process, on a terminal of so many columns."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["dynamicemb", *map(str, arguments)]
    code = 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
        mock.patch.object(warnings, "showwarning", warnings.showwarning),
        mock.patch.object(model, "quieten_libraries"),  # other tests share this process, its filters and loggers
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return Result(code, out.getvalue(), err.getvalue())


def process(*arguments: object, ranks: int = 0, cwd: Path = ROOT) -> Result:
    """Runs ``python -m dynamicemb`` in ``cwd``, or so many ranks of it under torchrun."""
    start = torchrun(ranks) if ranks else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "-m", "dynamicemb", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, **(C10D_ERRORS_ONLY if ranks else {})},  # without torchrun, our launcher asks for that
        timeout=TIMEOUT_SECONDS,
    )
    return Result(done.returncode, done.stdout, done.stderr)
