"""One part of the first fifteen minutes on a GPU, from a folder with a bundle to a folder with what was found.

    python -m benchmarks.quarter_hour 1 --bundle .gpu --out $OUT     unpack, does it work, how fast is a step
    python -m benchmarks.quarter_hour 2 --bundle .gpu --out $OUT     does it do what the CPU engine does
    python -m benchmarks.quarter_hour 3 --bundle .gpu --out $OUT     checkers, more topics, one experiment
    python -m benchmarks.quarter_hour 1 --dry-run                    the same on the CPU, in tiny sizes

Needs neither pip nor make nor a network. Each finding is a line of JSON, printed and appended to findings.jsonl as soon
as it is there; logs and results are packed every few seconds. Nothing that fails, hangs or crashes stops the rest. It
ends by itself within the given seconds. The exit status is 1 if a finding failed, if there is none, and if it was
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .journal import FAILED, INTERRUPTED, OK, SKIPPED, Interruption, Journal
from .parts import SECONDS, Place, background, stages
from .processes import adopt_orphans
from .snapshots import Snapshots
from .stages import Session, Stage, run_stage

ROOT = Path(__file__).resolve().parents[2]
#: Of the time: for ending what runs, and for the last archive.
CLOSING_SECONDS = 2.5


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quarter_hour", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("part", type=int, choices=tuple(SECONDS))
    parser.add_argument("--bundle", type=Path, default=Path(".gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "quarter-hour")), metavar="DIR",
        help="for findings.jsonl and the archives (default: $OUT, or %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/quarter-hour"), metavar="DIR",
        help="for what is unpacked and written meanwhile (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="in all (default: 300, 240 and 240)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    for name, folder in (("--out", options.out), ("--work", options.work)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{name} {folder}: no such folder can be made: {error.strerror}")
        if not os.access(folder, os.W_OK):
            parser.error(f"{name} {folder}: nothing can be written there")
    return options


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def environment(work: Path) -> dict[str, str]:
    """Of the processes: what was unpacked comes first, and whatever was on the path stays on it."""
    folders = [work / "libraries", work / "wheels", ROOT, ROOT / "benchmarks"]
    # An assembler other than Triton's own would change the keys of all compiled kernels.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def run(given: Sequence[Stage], beside: Sequence[Stage], session: Session) -> None:
    """All stages, those ``beside`` at the same time as the others. Closes the session, however it ends."""
    threads = [threading.Thread(target=run_stage, args=(stage, session), daemon=True) for stage in beside]
    try:
        for thread in threads:
            thread.start()
        waiting = list(given)
        while waiting:
            run_stage(waiting.pop(0), session)
        for thread in threads:  # each ends with its stage, at the deadline
            thread.join()
    except BaseException:
        for stage in waiting:
            session.journal.add(stage.name, SKIPPED, 0.0, reason=INTERRUPTED)
        raise
    finally:
        session.close()
        for thread in threads:  # it names what it has not found
            if thread.is_alive():
                thread.join(CLOSING_SECONDS)


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    began = time.monotonic()
    options = _parse(arguments)
    seconds = SECONDS[options.part] if options.seconds is None else options.seconds
    out, work = options.out.resolve(), options.work.resolve()
    results = work / f"results-{options.part}"
    shutil.rmtree(results, ignore_errors=True)
    for folder in (results, work / "triton"):
        folder.mkdir(exist_ok=True)
    place = Place(options.bundle.resolve(), work, results, options.dry_run)
    interruption = Interruption()
    journal = Journal(out / "findings.jsonl", options.part, interruption.held)
    adopt_orphans()
    interruption.install()
    session = Session(
        journal, results, ROOT, environment(work), began + seconds - CLOSING_SECONDS, work / "triton"
    )  # fmt: skip
    snapshots = Snapshots(results, out / f"part-{options.part}.tar.gz")
    reason = INTERRUPTED
    try:
        run(stages(options.part, place), background(options.part, place), session)
        reason = ""
    finally:
        snapshots.finish()
        counts = dict(journal.outcomes)
        outcome = FAILED if reason or counts[FAILED] else OK if counts[OK] else SKIPPED
        journal.add("part", outcome, time.monotonic() - began, counts, reason)
    return 0 if outcome == OK else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
