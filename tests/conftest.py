"""Settings of the whole suite."""

from __future__ import annotations

import os

# Before torch is imported: two threads on any machine. The tests' work is small, and many start several processes.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import settings

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
