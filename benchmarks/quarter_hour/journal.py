"""Findings as lines of JSON: each is whole on the disk before the next thing begins, whatever then happens to us."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "FAILED", "INTERRUPTED", "OK", "SKIPPED", "START_ANEW", "Interruption", "Journal", "append_line", "read_lines",
]  # fmt: skip

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
#: Why a stage has not come to its end, or has not begun, if somebody has ended the command.
INTERRUPTED = "interrupted"
#: Exit status of a process that can find nothing more itself, through no fault of what was to come: it lost the device.
START_ANEW = 75
#: Of one finding: characters of its reason, of which both ends are kept, and of its figures.
REASON_CHARS, FIGURES_CHARS = 4000, 64 << 10
#: Of the file, above which lines have neither: a machine may give back files of 16 MiB at most.
MOST_BYTES = 12 << 20


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one line in one write, so that no reader and no interruption sees half of it."""
    line = (json.dumps(record) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def read_lines(path: Path, begin: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Records of the whole lines from byte ``begin`` on, and where the next one will begin. A line that is no record,
    from a process that was killed, is passed over."""
    if not path.exists():
        return [], begin
    with path.open("rb") as file:
        file.seek(begin)
        content = file.read()
    end = content.rfind(b"\n") + 1
    records = []
    for line in content[:end].splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records, begin + end


class Interruption:
    """A handler of signals that ends the command by ``SystemExit``, though not in the middle of a finding."""

    def __init__(self) -> None:
        self._held = self._came = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, *_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # one is enough, and what follows has to be finished
            signal.signal(number, signal.SIG_IGN)
        if not self._held:
            raise SystemExit(INTERRUPTED)
        self._came = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes within the block takes effect at its end."""
        if threading.current_thread() is not threading.main_thread():  # in which all signals are handled
            yield
            return
        self._held = True
        try:
            yield
        finally:
            self._held = False
            came, self._came = self._came, False
            if came:
                raise SystemExit(INTERRUPTED)


class Journal:
    """Prints and appends findings.

    Args:
        path: of the file; lines of earlier runs stay in it.
        part: number of the part, in every line.
        held: within which nothing interrupts.
    """

    def __init__(
        self,
        path: Path,
        part: int,
        held: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._path, self._part, self._lock, self._held = path, part, threading.Lock(), held
        self.outcomes = {OK: 0, FAILED: 0, SKIPPED: 0}

    def add(
        self, name: str, outcome: str, seconds: float, figures: Mapping[str, Any] | None = None, reason: str = ""
    ) -> None:
        """One finding. ``reason`` says why it failed or was skipped. A full disk, or a terminal that has gone, costs
        the line, and not the findings to come."""
        record: dict[str, Any] = {"part": self._part, "name": name, "seconds": round(seconds, 2), "outcome": outcome}
        with self._held(), self._lock:
            self.outcomes[outcome] += 1
            if self._has_room():
                record |= {"figures": _clipped_figures(figures)} if figures else {}
                record |= {"reason": _clipped(reason)} if reason else {}
            record["at"] = time.strftime("%H:%M:%S")
            with contextlib.suppress(OSError):
                append_line(self._path, record)
            _say(json.dumps(record))

    def _has_room(self) -> bool:
        try:
            return self._path.stat().st_size < MOST_BYTES
        except OSError:
            return True


def _clipped(reason: str) -> str:
    half = REASON_CHARS // 2
    return reason if len(reason) <= REASON_CHARS else f"{reason[:half]} [...] {reason[-half:]}"


def _clipped_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    chars = len(json.dumps(figures))
    return dict(figures) if chars <= FIGURES_CHARS else {"left out": f"{chars} characters of figures"}


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # nobody reads it any more; what is left in the buffer would fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass
