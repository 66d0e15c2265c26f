"""Triton's interpreter, which tests start in processes of their own: it is chosen before anything imports Triton."""

from __future__ import annotations

import numpy as np
import pytest
import triton

__all__ = ["needs_interpreter"]


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


#: It takes a number from an array of one element, which NumPy has deprecated before and refuses since 2.4.
needs_interpreter = pytest.mark.skipif(
    _release(triton.__version__) < (3, 7) and _release(np.__version__) >= (2, 4),
    reason=f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}; it needs one below 2.4",
)
