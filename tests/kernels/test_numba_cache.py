"""Where compiled kernels are kept, what is said before they are compiled, installations that cannot be written."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numba.core import caching

from dynamicemb.kernels import numba_cache

SOURCE = """
from dynamicemb.kernels.numba_support import kernel

@kernel
def add(values, number):
    for i in range(values.size):
        values[i] += number
"""
Load = Callable[[], ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Load:
    """Imports a module with a kernel, as a new process would."""
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(caching.config, "CACHE_DIR", "")
    monkeypatch.setattr(logging.getLogger("dynamicemb"), "propagate", True)
    caplog.set_level(logging.WARNING, "dynamicemb")
    path = tmp_path / "package" / "toy.py"
    path.parent.mkdir()
    path.write_text(SOURCE)

    def fresh() -> ModuleType:
        monkeypatch.setattr(numba_cache, "_announced", False)
        caplog.clear()
        spec = importlib.util.spec_from_file_location("toy", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return fresh


def run(module: ModuleType) -> bool:
    """Calls the kernel; returns whether it was compiled."""
    values = np.arange(3)
    module.add(values, 2)
    assert values.tolist() == [2, 3, 4]
    return sum(module.add.stats.cache_misses.values()) > 0


def test_a_first_compilation_is_said_once(load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = load()
    assert run(module)
    module.add(np.zeros(2), 0.5)  # another signature
    [said] = caplog.messages
    assert said.startswith("dynamicemb: compiling CPU kernels for this machine")
    assert said.endswith(f"once: the result is kept under {tmp_path}")
    assert not run(load())
    assert caplog.messages == []


def test_one_process_of_a_machine_says_it(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(load())
    assert caplog.messages == []


def test_the_same_sources_installed_again_need_no_compilation(load: Load, tmp_path: Path) -> None:
    assert run(load())
    (tmp_path / "package" / "toy.py").touch()
    assert not run(load())


def test_sources_that_changed_need_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(load())
    monkeypatch.setattr(numba_cache, "_STAMP", "another")
    assert run(load())


def unwritable(locator: object) -> None:
    raise PermissionError("read-only")


def test_an_installation_that_cannot_be_written_is_read(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(load())
    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", unwritable)
    assert not run(load())
    assert caplog.messages == []


def test_what_is_missing_there_goes_to_the_folder_that_is_named(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.config, "CACHE_DIR", str(tmp_path / "elsewhere"))
    assert run(load())
    assert caplog.messages[0].endswith(f"kept under {tmp_path / 'elsewhere'}")
    assert not (tmp_path / "package" / "__pycache__").exists()
    assert not run(load())


def test_no_place_at_all_is_no_error(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", unwritable)
    for _ in range(2):
        assert run(load())
        [said] = caplog.messages
        assert "in each process" in said and "NUMBA_CACHE_DIR" in said


def test_a_disk_that_is_full_is_no_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert run(load())
