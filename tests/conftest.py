"""Settings of the whole suite."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before torch is imported: two threads on any machine. The tests' work is small, and many start several processes.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import settings

# Before typer and rich are imported: by these a user, or GitHub, asks for colours or a width, and tests read what the
# programs write where nobody has asked for anything. Processes that tests start inherit that.
for _name in (
    "CLICOLOR_FORCE", "COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH",
    "TTY_COMPATIBLE", "TTY_INTERACTIVE",
):  # fmt: skip
    os.environ.pop(_name, None)


def _use_triton_cache() -> None:
    """Triton keeps what it compiles below the home folder. Where that cannot be written to: in the temporary folder."""
    if "TRITON_CACHE_DIR" in os.environ:
        return
    try:
        default = Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
        default.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=default).close()
    except (OSError, RuntimeError):  # RuntimeError: nobody says where the home folder is
        os.environ["TRITON_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"triton-{os.getuid()}")


_use_triton_cache()

# No deadline: the first call of a kernel compiles it. Derandomised: a rerun must not turn red to green.
settings.register_profile("dynamicemb", deadline=None, derandomize=True)
# Another seed each time, and more examples (tests/exploring.py). A failure prints what repeats it.
settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True, max_examples=1000)
settings.load_profile("dynamicemb")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked ``gpu`` where torch finds no GPU, and puts files with slow tests first.

    Where workers share the files, none is left alone with a long one at the end.
    """
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
