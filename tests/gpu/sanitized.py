"""A few steps of every kind for a memory checker to watch: growth, eviction, refused keys, evaluation, all optimizers.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitized

Results are compared with the CPU engine's on the way. With ``--plant`` it does nothing but write past the end of a
tensor, so that one can see whether a checker notices.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl

from tests.gpu.cases import FEW, MATRIX
from tests.gpu.life import live
from tests.gpu.scale import Scale

__all__ = ["FINISHED", "main"]

#: Last line of a run that came to its end.
FINISHED = "all cases lived"
#: One with rows of several warps besides those that have every optimizer and policy.
CASES = [*FEW, next(case for case in MATRIX if case.dim == 1024)]


@triton.jit
def _write_past_the_end(values, SIZE: tl.constexpr):
    tl.store(values + SIZE, 1)


def plant(device: torch.device) -> None:
    """One element past the end of a tensor that has the allocation for itself."""
    values = torch.zeros(1 << 20, dtype=torch.int32, device=device)
    _write_past_the_end[(1,)](values, SIZE=values.numel())
    torch.cuda.synchronize()


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where the tables live (default: %(default)s)")
    parser.add_argument("--plant", action="store_true", help="write past the end of a tensor instead")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if given.plant:
        plant(device)
        return
    for case in CASES:
        live(case.toy(case.bucket_capacity), Scale(device, full=True))
    print(FINISHED, flush=True)


if __name__ == "__main__":
    main()
