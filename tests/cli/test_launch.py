"""Ranks that a program starts itself: exit codes, what is said of a rank that could say nothing, torchrun's reason."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dynamicemb.cli.console import warn
from dynamicemb.cli.launch import record_failure
from dynamicemb.cli.quiet import quieten_libraries
from tests.cli.command import ROOT
from tests.processes import TIMEOUT_SECONDS

RANKS = """
import os, signal, sys, time
sys.stdout.write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} threads\\n")
how, spoken = sys.argv[1:]
if os.environ["RANK"] == "0":
    open(spoken, "w").close()
    time.sleep(0 if how == "well" else 600)
    sys.exit()
while not os.path.exists(spoken):  # the end of this rank ends the other one
    time.sleep(0.01)
sys.exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else sys.exit()
"""
#: The machine's name is another one than the ranks are to use: not one that nobody can resolve, with which they hang.
LAUNCH = """
import socket, sys
from dynamicemb.cli.launch import launch
socket.getfqdn = lambda *_: "127.0.0.1"
sys.exit(launch(2, ["-c", *sys.argv[1:]]))
"""


def _launched(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAUNCH, program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_SECONDS)


@pytest.mark.parametrize(
    ("how", "code", "err"),
    [
        ("well", 0, ""),
        ("exit", 3, ""),
        ("kill", 137, "error: rank 1 was ended by SIGKILL; the system ends processes so when memory runs out\n"),
    ],
)
def test_the_end_of_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, code: int, err: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    done = _launched(RANKS, how, tmp_path / "spoken")
    assert (done.returncode, done.stderr) == (code, err)
    assert sorted(done.stdout.splitlines()) == ["0 of 2, 7 threads", "1 of 2, 7 threads"]


@pytest.mark.parametrize("level", ["", "INFO"])
def test_ranks_meet_without_a_name_service_and_without_its_warnings(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    if level:
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", level)
    program = "import os, sys; sys.stdout.write('{MASTER_ADDR} {TORCH_CPP_LOG_LEVEL}\\n'.format_map(os.environ))"
    done = _launched(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"localhost {level or 'ERROR'}"] * 2


def test_what_torchrun_finds_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    record_failure("nowhere")
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    warn("warning", "no failure")
    assert not path.exists()
    warn("error", "disk\nfull")
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    failure = ProcessFailure(0, 1, 1, str(path))
    assert failure.message["extraInfo"]["py_callstack"] == "error: disk full"  # type: ignore[index]
    assert json.loads(path.read_text())["message"]["message"] == "error: disk full"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
    record_failure("nowhere")


def test_only_what_nobody_can_act_on_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torchrec"), "level", logging.NOTSET)  # other tests may have quietened it
    planner = logging.getLogger("torchrec.distributed.planner")
    monkeypatch.setattr(planner, "level", planner.level)
    own = logging.getLogger("dynamicemb")
    monkeypatch.setattr(own, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.getLogger("torch.fx"), "level", logging.getLogger("torch.fx").level)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quieten_libraries()
        for module in ("torch.a", "torchrec.b.c", "fbgemm_gpu", "torchmetrics.a", "mine", "torchrecipes"):
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.warn_explicit("said", category, f"{module}.py", 1, module=module)
        said = [(warning.filename, warning.category) for warning in seen]
    others = [(f"{name}.py", kind) for name in ("torchmetrics.a", "mine", "torchrecipes")
              for kind in (FutureWarning, DeprecationWarning, UserWarning)]  # fmt: skip
    assert said == [(f"{name}.py", UserWarning) for name in ("torch.a", "torchrec.b.c", "fbgemm_gpu")] + others
    assert not logging.getLogger("torchrec.distributed.planner.types").isEnabledFor(logging.WARNING)
    assert logging.getLogger("torchrec.distributed.planner.types").isEnabledFor(logging.ERROR)
    assert logging.getLogger("torchrec.distributed.embedding").isEnabledFor(logging.WARNING)


def test_importing_the_library_changes_no_filter() -> None:
    code = (
        "import logging, warnings, torchrec, torchrec.distributed; before = list(warnings.filters); "
        "import dynamicemb.shard, dynamicemb.planner, dynamicemb.checkpoint.load, dynamicemb.cli; "
        "print(warnings.filters == before, logging.getLogger('torchrec.distributed.planner').level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_SECONDS
    )
    assert done.stdout == "True 0\n", done.stderr
