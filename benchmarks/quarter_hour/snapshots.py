"""What has been found so far, in one archive that is whole at any moment."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import threading
from pathlib import Path

__all__ = ["Snapshots"]

MIB = 1 << 20
#: Of all that goes into an archive, before it is compressed: a machine may give back files of 16 MiB at most.
MOST_BYTES = 14 * MIB
#: Of one log: its end.
LOG_BYTES = 256 << 10


class Snapshots:
    """Packs a folder into an archive, again and again in a thread of its own, until :meth:`finish`.

    Each archive is written under another name and renamed, so a reader never sees half of one.

    Args:
        folder: what is packed.
        archive: a ``.tar.gz`` file.
        interval_seconds: between two archives.
    """

    def __init__(self, folder: Path, archive: Path, interval_seconds: float = 5.0) -> None:
        self._folder, self._archive, self._interval = folder, archive, interval_seconds
        self._ended = threading.Event()
        self._last: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._try()

    def finish(self) -> None:
        """The last archive."""
        self._ended.set()
        self._thread.join()
        self._try()

    def _try(self) -> None:
        """An archive, unless the disk is full, say: then the one before stays, and the next one has its turn."""
        with contextlib.suppress(OSError):
            self._take()

    def _take(self) -> None:
        files = {}
        for file in self._folder.rglob("*"):
            try:
                status = file.stat()
            except OSError:  # it has just been removed
                continue
            if file.is_file():
                files[str(file.relative_to(self._folder))] = status.st_size, status.st_mtime_ns
        if files == self._last and self._archive.exists():
            return
        temporary = self._archive.with_name(self._archive.name + ".tmp")
        try:
            self._write(temporary, files)
            os.replace(temporary, self._archive)
        finally:  # few files are given back, and half an archive should not be one of them
            temporary.unlink(missing_ok=True)
        self._last = files

    def _write(self, path: Path, files: dict[str, tuple[int, int]]) -> None:
        """Small files first; what does not fit is named."""
        room, left_out = MOST_BYTES, []
        with tarfile.open(path, "w:gz", compresslevel=3) as tar:
            for name in sorted(files, key=lambda name: files[name][0]):
                content = self._content(name)
                if content is None:
                    continue
                if len(content) > room:
                    left_out.append(name)
                    continue
                room -= len(content)
                _add(tar, name, content)
            if left_out:
                _add(tar, "left-out.txt", "\n".join(left_out).encode())

    def _content(self, name: str) -> bytes | None:
        try:
            with (self._folder / name).open("rb") as file:
                if name.endswith(".log"):
                    file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
                return file.read(MOST_BYTES + 1)
        except OSError:
            return None


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
