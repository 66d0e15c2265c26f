"""Where a scenario runs: at full size on a GPU, or at toy size wherever the suite does, so that it is known to work.

At toy size a second CPU engine stands for the GPU. In Triton's interpreter (``TRITON_INTERPRET=1``) it is the Triton
engine on host tensors instead; :mod:`tests.gpu.test_interpreted` runs the scenarios there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from dynamicemb.kernels.engine import ENGINE_VARIABLE

__all__ = ["CPU", "FULL", "INTERPRETED", "SCALES", "TOY", "Scale"]

CPU = torch.device("cpu")
#: Whether this process is Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Scale:
    """Where and how large.

    Attributes:
        device: of the engine under test.
        full: whether sizes are those that the test is for.
    """

    device: torch.device
    full: bool

    @contextmanager
    def engine(self) -> Iterator[None]:
        """Inside the block, tensors on ``device`` belong to the engine under test."""
        forced = {ENGINE_VARIABLE: "triton"} if INTERPRETED else {}
        with mock.patch.dict(os.environ, forced):
            yield


TOY = Scale(CPU, full=False)
FULL = Scale(torch.device("cuda"), full=True)
#: For ``pytest.mark.parametrize("scale", SCALES)``.
SCALES = [pytest.param(TOY, id="toy"), pytest.param(FULL, id="gpu", marks=pytest.mark.gpu)]
