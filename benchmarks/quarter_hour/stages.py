"""A stage is one process that makes findings. Whatever becomes of the process, the stages after it have their turn."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .journal import FAILED, INTERRUPTED, OK, SKIPPED, START_ANEW, Journal, read_lines
from .processes import end, kill_orphans, reap, start, tail

__all__ = ["Session", "Stage", "run_stage"]

POLL_SECONDS = 0.05
#: That a killed process may take to end, while there is time, and after the deadline. One that held most of a GPU's
#: memory takes a second or so.
ENDING_SECONDS, LATE_ENDING_SECONDS = 2.0, 0.5


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of the stage, in front of the names of its findings.
        command: from the names of the findings that are still to come, and the seconds that are left for them, to a
            command line. ``--findings FILE`` is added: the process appends a line of JSON for each finding to the file.
        findings: names of those that the process makes, in order. If it dies or hangs, it is started anew for those
            after the one that it died in, or for all that are left if it ended with :data:`START_ANEW`. None are known
            before for a run of pytest.
        seconds: for all of it.
        silence_seconds: without a finding, after which it hangs.
        least_seconds: below which it is not begun.
        environment: what its environment has besides that of the session.
    """

    name: str
    command: Callable[[tuple[str, ...], float], list[str]]
    findings: tuple[str, ...] = ()
    seconds: float = 60.0
    silence_seconds: float = 60.0
    least_seconds: float = 2.0
    environment: Mapping[str, str] = field(default_factory=dict)


class Session:
    """What the stages of a part have in common.

    Args:
        journal: of the findings.
        results: folder of logs and of whatever the stages write.
        root: folder that the processes run in.
        environment: of the processes.
        deadline: of :func:`time.monotonic`; after it no process of the session runs.
        kernel_cache: folder in which Triton keeps what it compiles.
    """

    def __init__(
        self, journal: Journal, results: Path, root: Path, environment: Mapping[str, str], deadline: float,
        kernel_cache: Path,
    ) -> None:  # fmt: skip
        self.journal, self.results, self.root = journal, results, root
        self.environment, self.deadline = environment, deadline
        self._kernel_cache, self._known_kernels = kernel_cache, set[Path]()
        self._lock, self._running = threading.Lock(), dict[int, subprocess.Popen[bytes]]()
        self._closed = False
        self.newly_compiled()

    def left(self) -> float:
        """Seconds; none once the session is closed."""
        return 0.0 if self._closed else self.deadline - time.monotonic()

    def newly_compiled(self) -> list[str]:
        """Names of the kernels that were compiled since this was asked last: launches that found no compiled one."""
        with self._lock:
            try:
                now = set(self._kernel_cache.glob("*/*.source"))  # which those that were installed do not have
            except OSError:  # Triton has just removed one of its folders
                return []
            new, self._known_kernels = now - self._known_kernels, now
        return sorted(file.stem for file in new)

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A process of this session; one that is not known is taken for what another has left behind."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            process = start(command, log, self.root, {**self.environment, **environment})
            self._running[process.pid] = process
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends it, and what it has left behind."""
        seconds = min(ENDING_SECONDS, max(LATE_ENDING_SECONDS, self.left()))
        end(process, seconds)
        with self._lock:
            self._running.pop(process.pid, None)
            orphans = kill_orphans([*self._running])
        reap(orphans, seconds)

    def close(self) -> None:
        """Ends what still runs. Nothing can be started afterwards: a stage in another thread sees its process end, and
        would go on with a new one."""
        with self._lock:
            self._closed = True
        for process in [*self._running.values()]:
            self.end(process)


class _Attempt:
    """One process of a stage, from its start to its end."""

    def __init__(self, stage: Stage, session: Session, pending: list[str], left: float, number: int) -> None:
        self.log = session.results / f"{stage.name}.log"
        file = session.results / f"{stage.name}.{number}.jsonl"
        command = [*stage.command(tuple(pending), left), "--findings", str(file)]
        self._stage, self._session, self._file, self._read = stage, session, file, 0
        self._pending, self._given = pending, len(pending)
        self.began = self._heard = time.monotonic()
        self._limit = self.began + left
        self._process = session.start(command, self.log, stage.environment)

    def run(self) -> str:
        """Waits for the end. Returns why it ended before it was done, or an empty text."""
        try:
            reason = self._wait()
        finally:
            self._session.end(self._process)
        self._hear()
        return reason

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self._limit or self._session.left() <= 0

    @property
    def hands_over(self) -> bool:
        """Whether another process should find the rest. One that has found nothing would be started for ever."""
        return self._process.returncode == START_ANEW and len(self._pending) < self._given

    def since_heard(self) -> float:
        return time.monotonic() - self._heard

    def _wait(self) -> str:
        while (code := self._process.poll()) is None:
            self._hear()
            if self.out_of_time:
                return f"ended after {time.monotonic() - self.began:.0f} s: out of time"
            if self.since_heard() > self._stage.silence_seconds:
                return f"killed: nothing was heard of it for {self._stage.silence_seconds:g} s"
            time.sleep(POLL_SECONDS)
        if code == 0:
            return ""
        return f"exit status {code}" if code > 0 else f"ended by signal {-code}"

    def _hear(self) -> None:
        """Hands on what the process has found since."""
        records, self._read = read_lines(self._file, self._read)
        for record in records:
            seconds = record.get("seconds", self.since_heard())
            self._heard = time.monotonic()
            name = str(record["name"])
            if name in self._pending:
                self._pending.remove(name)
            self._session.journal.add(
                f"{self._stage.name}: {name}", record["outcome"], seconds, record.get("figures"),
                record.get("reason", ""),
            )  # fmt: skip


def run_stage(stage: Stage, session: Session) -> None:
    """Runs the stage to its end, and adds a finding about the process itself. Raises nothing of its own."""
    began = time.monotonic()
    try:
        outcome, reason = _attempts(stage, session, began)
    except Exception as error:  # a command that does not exist, a full disk
        outcome, reason = FAILED, f"{type(error).__name__}: {error}"
    except BaseException:  # the command is being ended
        session.journal.add(stage.name, SKIPPED, time.monotonic() - began, reason=INTERRUPTED)
        raise
    compiled = session.newly_compiled()
    figures = {"kernels compiled": len(compiled), "which": sorted(set(compiled))} if compiled else {}
    session.journal.add(stage.name, outcome, time.monotonic() - began, figures, reason)


def _attempts(stage: Stage, session: Session, began: float) -> tuple[str, str]:
    """The outcome of the stage's process, and why."""
    pending, number, outcome, reason = list(stage.findings), 0, OK, ""
    while True:
        left = min(began + stage.seconds - time.monotonic(), session.left())
        if left < stage.least_seconds:
            for name in pending:
                session.journal.add(f"{stage.name}: {name}", SKIPPED, 0.0, reason="no time is left for it")
            return (outcome, reason) if number else (SKIPPED, "no time is left for it")
        attempt = _Attempt(stage, session, pending, left, number)
        try:
            ended, number = attempt.run(), number + 1
        except BaseException:
            for name in pending:
                session.journal.add(f"{stage.name}: {name}", SKIPPED, 0.0, reason=INTERRUPTED)
            raise
        unfinished = SKIPPED if attempt.out_of_time else FAILED
        if not pending:
            if ended and not stage.findings:
                return unfinished, f"{ended}\n{tail(attempt.log)}"
            return (outcome, reason) if outcome != OK else (OK, ended)
        if attempt.hands_over:
            continue
        outcome, reason = unfinished, ended or "it ended without this finding"
        session.journal.add(
            f"{stage.name}: {pending.pop(0)}", outcome, attempt.since_heard(), reason=f"{reason}\n{tail(attempt.log)}"
        )
        if not pending:
            return outcome, reason
