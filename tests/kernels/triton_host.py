"""Where Triton kernels can run in this process: on a GPU, or in Triton's interpreter. Skips the module that imports it
where neither is possible.

The interpreter has to be chosen before anything imports Triton, which no test of a larger run can promise. So the
``test_triton_*.py`` modules are skipped in a plain run on a machine without a GPU, and :mod:`test_interpreter` runs
them in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dynamicemb.kernels.engine import ENGINE_VARIABLE

__all__ = ["DEVICE", "INTERPRETED", "MARKS", "engine"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; test_interpreter.py runs this module in a process of its own", allow_module_level=True)

#: Device of the tensors that Triton kernels get.
DEVICE = "cpu" if INTERPRETED else "cuda"
#: For ``pytestmark``.
MARKS = [] if INTERPRETED else [pytest.mark.gpu]


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Forces an engine inside the block."""
    before = os.environ.get(ENGINE_VARIABLE)
    os.environ[ENGINE_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENGINE_VARIABLE]
        else:
            os.environ[ENGINE_VARIABLE] = before
