"""Checks of a machine that nobody has seen before, each in its own try: what is there, and whether it works."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .journal import FAILED, OK, append_line

__all__ = ["CHECKS", "main"]

#: Modules that the stages need, and those without which a part of them is skipped or fails.
NEEDED = ("torch", "triton", "numpy", "numba", "rich", "pytest", "xdist", "hypothesis")
MODULES = (*NEEDED, "fbgemm_gpu", "torchrec", "torchmetrics.functional", "pyarrow")
TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi", "gcc")
_CUDA = Path("/usr/local/cuda/bin")


def tool(name: str) -> str | None:
    """Where a tool is: on the path, or with CUDA."""
    return shutil.which(name) or shutil.which(name, path=str(_CUDA))


class NoGpuError(Exception):
    """torch finds none, and what was asked for is no dry run."""


def device() -> dict[str, Any]:
    """The GPU, and what talks to it."""
    import torch
    import triton
    from gpu.device import CudaDevice, HostDevice

    facts = (CudaDevice() if torch.cuda.is_available() else HostDevice()).facts()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {**vars(facts), "compute capability": capability, **versions, **{name: tool(name) for name in TOOLS}}


def imports() -> dict[str, Any]:
    """Versions of what is imported; a module that fails is named, and the others are tried all the same."""
    result: dict[str, Any] = {}
    missing = []
    for name in MODULES:
        start = time.perf_counter()
        try:
            module = importlib.import_module(name)
            result[name] = f"{getattr(module, '__version__', 'there')}, {time.perf_counter() - start:.1f} s"
        except BaseException as error:
            result[name] = f"{type(error).__name__}: {error}"
            missing.append(name)
    if not set(missing).isdisjoint(NEEDED):
        raise ImportError(f"{missing}: {result}")
    return result


def tbe() -> dict[str, Any]:
    """A forward and a backward pass of fbgemm's tables: its library needs what the driver may lack."""
    import torch
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        OptimType,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    cuda = torch.cuda.is_available()
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    target = torch.device("cuda" if cuda else "cpu")
    where = torch.cuda.get_device_name() if cuda else "host"
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(100, 8, *place)], optimizer=OptimType.EXACT_SGD, learning_rate=0.5, device=target
    )
    (weights,) = module.split_embedding_weights()
    weights.fill_(1.0)
    ids, offsets = torch.tensor([3, 3, 7], device=target), torch.tensor([0, 2, 3], device=target)
    rows = module(ids, offsets)
    rows.sum().backward()
    expected = torch.ones(100, device=target)
    expected[3], expected[7] = 0.0, 0.5
    assert rows[:, 0].tolist() == [2.0, 1.0], rows
    assert torch.equal(weights[:, 0], expected), weights[:, 0]
    return {"device": where, "bag of two": rows[0, 0].item(), "row after its update": weights[3, 0].item()}


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {"device": device, "imports": imports, "tbe": tbe}


#: Those that are about a GPU, which pass on a host as well.
ON_GPU = ("device", "tbe")


def _checked(name: str, dry: bool) -> dict[str, Any]:
    figures = CHECKS[name]()
    import torch

    if name in ON_GPU and not (dry or torch.cuda.is_available()):
        raise NoGpuError(f"torch {torch.__version__} finds no GPU; on the host there is: {figures}")
    return figures


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=tuple(CHECKS))
    parser.add_argument("--dry-run", action="store_true", help="a machine without a GPU will do")
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in options.names:
        start = time.perf_counter()
        try:
            record: dict[str, Any] = {"outcome": OK, "figures": _checked(name, options.dry_run)}
        except Exception:
            record = {"outcome": FAILED, "reason": traceback.format_exc()[-1500:]}
        append_line(options.findings, {"name": name, "seconds": round(time.perf_counter() - start, 2), **record})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
