"""What libraries say to their own developers, kept off the screens of the command and of the examples.

Our own notices stay, each on a line of its own.

Importing dynamicemb changes no filter: only programs of ours, which own their process, call this.
"""

from __future__ import annotations

import logging
import warnings

__all__ = ["quieten_libraries"]

#: Loggers whose warnings are about how torchrec's classes call each other.
_LOGGERS = ("torchrec.distributed.planner", "torch.fx")


def quieten_libraries() -> None:
    """Hides deprecations inside torch, torchrec and fbgemm, and torchrec's hints to those who build its planner.

    A user of the program can do nothing about them. Warnings of any other kind stay, and so do all errors.
    """
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|torchrec|fbgemm_gpu)\b")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    own = logging.getLogger("dynamicemb")
    if not own.handlers:
        # torchrec's first message gives the root logger a handler that repeats level and name.
        own.addHandler(logging.StreamHandler())
        own.propagate = False
