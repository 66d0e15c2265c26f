"""Ranks that a program of ours starts itself, as torchrun does, but without its report of what a rank has said already.

torchrun ends with a traceback of its own whenever a rank ends with an exit code that is not 0. The rank cannot prevent
that; it can only leave a message that torchrun shows at the end (:func:`record_failure`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

__all__ = ["RANK_VARIABLE", "launch", "record_failure"]

#: Set by torchrun, and by :func:`launch`, for each rank.
RANK_VARIABLE = "RANK"
_INTERRUPTED = 130


def launch(ranks: int, command: Sequence[str]) -> int:
    """Runs ``python command...`` in so many processes on this machine, with the environment that torchrun sets.

    Each gets an equal share of the processors, unless ``OMP_NUM_THREADS`` says how many threads it may have. As soon as
    one ends with an error, the others are ended, too. They meet on this machine's loopback, so that nobody needs to
    resolve its name.

    Warnings of torch's C++ libraries are left out, unless ``TORCH_CPP_LOG_LEVEL`` asks for them: where no name service
    answers, c10d has one for each connection. Those of this process itself are shown if it has imported torch before.

    Returns:
        the exit code: 0 if all ranks ended with 0, else that of the first one that did not; 128 and the signal's number
        if a signal ended it, which is said on stderr, since the rank could not say anything itself.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, when torch is imported
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What these loggers would say of a failure is said here, or has been said by the rank itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(own) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except SignalException as error:
        return _INTERRUPTED if error.sigval == signal.SIGINT else 128 + error.sigval
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    # The ranks that were ended because of the first one have SIGTERM, and perhaps the same second.
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM} or failures
    rank, first = min(own.items(), key=lambda item: item[1].timestamp)
    if first.exitcode >= 0:
        return first.exitcode
    hint = "; the system ends processes so when memory runs out" if first.exitcode == -signal.SIGKILL else ""
    print(f"error: rank {rank} was ended by {first.signal_name()}{hint}", file=sys.stderr, flush=True)
    return 128 - first.exitcode


def record_failure(message: str) -> None:
    """Leaves ``message`` where torchrun looks for the reason when this rank has ended; without torchrun, nowhere.

    Its report then ends with it, instead of the advice to read about tracebacks. The file is what
    ``torch.distributed.elastic.multiprocessing.errors.record`` would write.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w") as file:  # if it cannot be written: the message is on stderr
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
