"""Runs that are saved, killed and taken up again: the same numbers as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_train_criteo import _assert_one_error, _demo, _summary

pytestmark = pytest.mark.slow  # processes that train

SMALL = ("--rows", 1000, "--batch-size", 50, "--capacity", 512, "--epochs", 2)  # 18 steps in an epoch
KILLED_AT = 24
#: The demo, in which every process is killed as soon as the run has been saved in the middle of its second epoch.
KILLED = f"""
import os, signal, sys
sys.path.insert(0, "examples")
import saving, train_criteo
save = saving.SavedRun.save
def save_and_die(self, sharded, step):
    save(self, sharded, step)
    if step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
saving.SavedRun.save = save_and_die
sys.exit(train_criteo.main())
"""


def _numbers(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "ids_per_second"}


@pytest.mark.parametrize(
    ("world_size", "dynamic"), [(1, "all"), (2, "c1,c2,c3,c4,c20,c21")], ids=["dynamic", "static-too"]
)
def test_killed_in_the_second_epoch_and_taken_up(world_size: int, dynamic: str, tmp_path: Path) -> None:
    arguments = (*SMALL, "--dynamic", dynamic)
    uninterrupted = _summary(world_size, tmp_path / "whole.json", *arguments)
    saved = tmp_path / "run"
    (tmp_path / "killed.py").write_text(KILLED)
    killed = _demo(world_size, *arguments, "--save", saved, "--save-every", 8, program=tmp_path / "killed.py")
    assert killed.returncode != 0 and "AUC" not in killed.stdout
    assert sorted(entry.name for entry in tmp_path.glob("run*")) == ["run", f"run.rest-{KILLED_AT}"]
    summary = _summary(world_size, tmp_path / "resumed.json", *arguments, "--load", saved, "--save", saved)
    assert _numbers(summary) == _numbers(uninterrupted)
    again = _demo(world_size, *arguments, "--load", saved, "--summary", tmp_path / "again.json")
    assert "36 of 36 steps done, nothing is left to train" in again.stdout
    assert _numbers(json.loads((tmp_path / "again.json").read_text())) == _numbers(uninterrupted)
    assert sorted(entry.name for entry in tmp_path.glob("run*")) == ["run", "run.rest-36"]


def test_what_cannot_be_taken_up(tmp_path: Path) -> None:
    saved = tmp_path / "run"
    assert _demo(1, "--rows", 300, "--save", saved).returncode == 0
    _assert_one_error(_demo(1, "--rows", 300, "--load", saved, "--batch-size", 7), "--batch-size 7: the run saved in")
    _assert_one_error(_demo(1, "--rows", 300, "--save-every", 5), "--save-every needs --save")
    _assert_one_error(_demo(1, "--rows", 300, "--dynamic", "none", "--save", saved), "--dynamic none: --save")
    next(tmp_path.glob("run.rest-*")).rename(tmp_path / "elsewhere")
    _assert_one_error(_demo(1, "--rows", 300, "--load", saved), "keep the two together")
