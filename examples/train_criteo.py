"""Trains a DLRM-style model on Criteo click logs, or on a generated one, with a dynamic table for each feature.

    torchrun --standalone --nproc_per_node 2 examples/train_criteo.py --data criteo/ --summary result.json

``--help`` lists the options. Runs with any number of processes, on GPUs (NCCL) or on the CPU (gloo).
"""

from __future__ import annotations

import logging
import sys
import warnings

import demo_options
from ranks import Ranks

from dynamicemb import DynamicEmbError


def quieten_libraries() -> None:
    """Hides notices that torch and torchrec address to their own developers, a dozen lines on every rank."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    for library in ("torchrec.distributed.planner", "torch.fx"):
        logging.getLogger(library).setLevel(logging.ERROR)


def main() -> int:
    quieten_libraries()
    ranks = Ranks.from_environment()
    try:
        options = demo_options.parse(sys.argv[1:])
        # torchrec takes seconds to import: only after the options have been found to be right.
        from training import run

        run(options, ranks)
    except DynamicEmbError as error:
        ranks.report(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
