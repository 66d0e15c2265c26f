"""Trains a DLRM-style model on Criteo click logs, or on a generated one, with a dynamic table for each feature.

    python examples/train_criteo.py --ranks 2 --data criteo/ --summary result.json

``--help`` lists the options. Runs with any number of processes, on GPUs (NCCL) or on the CPU (gloo): started by itself
with ``--ranks``, or by torchrun.
"""

from __future__ import annotations

import os
import sys

import demo_options
from ranks import Ranks

from dynamicemb import DynamicEmbError
from dynamicemb.cli.launch import RANK_VARIABLE, launch
from dynamicemb.cli.quiet import quieten_libraries


def main() -> int:
    quieten_libraries()
    try:
        options = demo_options.parse(sys.argv[1:])
    except DynamicEmbError as error:
        Ranks.from_environment().report(error)
        return 1
    if options.ranks is not None and RANK_VARIABLE not in os.environ:
        return launch(options.ranks, sys.argv)
    ranks = Ranks.from_environment()
    try:
        # torchrec takes seconds to import: only after the options have been found to be right.
        from training import run

        run(options, ranks)
    except DynamicEmbError as error:
        ranks.report(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
