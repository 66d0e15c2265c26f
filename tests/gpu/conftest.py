"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _all_processors(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CPU engine is the slow side of a comparison at full size; the suite's two threads are for small work.
    Workers that run beside each other share the processors."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or before) // workers))
    yield
    torch.set_num_threads(before)
    torch.cuda.empty_cache()  # the next test's tables have other sizes
