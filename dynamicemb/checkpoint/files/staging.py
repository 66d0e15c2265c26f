"""Where a checkpoint is written until it is whole, and how it then takes the place of the one before in one step.

``<path>.unfinished`` is written first, file by file, its manifest last. When everything is on disk the two folders are
exchanged by one system call (Linux: ``renameat2`` with ``RENAME_EXCHANGE``), so at any moment ``<path>`` is either the
old checkpoint or the new one. Where a file system or an operating system cannot do that, the old one is first renamed
to ``<path>.previous``; readers take that one if they find it and no ``<path>``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from dynamicemb.checkpoint.files.manifest import MANIFEST, read_manifest
from dynamicemb.checkpoint.files.paths import PathLike, local_path
from dynamicemb.errors import CheckpointError

__all__ = ["Staging", "finished", "sync_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def finished(path: Path) -> Path:
    """The folder that holds the checkpoint ``path``: itself, or ``<path>.previous`` where that was not finished."""
    previous = _beside(Path(os.path.realpath(path)), ".previous")
    # os.path and not pathlib, which raises where a name is too long or a folder is closed: reading says so later.
    return previous if not os.path.exists(path) and os.path.exists(previous / MANIFEST) else path


def sync_folder(folder: Path) -> None:
    """Waits until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Staging:
    """The place of a checkpoint that is being written. One process calls all of this; any may write files meanwhile.

    Args:
        path: where the checkpoint will be.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(os.path.realpath(local_path(path)))  # where a link leads to: the link itself stays as it is
        self.folder = _beside(self.path, ".unfinished")

    def begin(self, overwrite: bool = False) -> None:
        """Makes an empty :attr:`folder`; what a dump that was killed left there is removed.

        Args:
            overwrite: also replace something that is no checkpoint.

        Raises:
            CheckpointError: ``path`` holds something else than a checkpoint or an empty folder.
        """
        try:
            if not overwrite:
                self._refuse_foreign()
            if self.folder.is_dir() and not self.folder.is_symlink():
                shutil.rmtree(self.folder)
            elif self.folder.exists():
                raise CheckpointError(f"{self.folder}: a file stands where the dump is prepared; remove it")
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {error.strerror}; choose a path that can be written to") from error

    def _refuse_foreign(self) -> None:
        if not os.path.lexists(self.path) or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        remedy = "choose another path, or overwrite=True (--overwrite) to replace it"
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a folder; {remedy}")
        try:
            own = set(read_manifest(self.path).files())
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} holds something that is not a checkpoint ({error}); {remedy}") from None
        here = {str(file.relative_to(self.path)) for file in self.path.rglob("*") if not file.is_dir()}
        if foreign := sorted(here - own):
            raise CheckpointError(f"{self.path} holds a checkpoint and other files, such as {foreign[0]}; {remedy}")

    def commit(self) -> None:
        """Puts the finished :attr:`folder`, all files of which are on disk, in the place of what was at ``path``.

        Raises:
            CheckpointError: that cannot be done.
        """
        try:
            self._commit()
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}; choose a path that can be written to") from error

    def _commit(self) -> None:
        for folder, _, _ in os.walk(self.folder):
            sync_folder(Path(folder))
        previous = _beside(self.path, ".previous")
        if not os.path.lexists(self.path):
            os.rename(self.folder, self.path)
        elif _exchange(self.folder, self.path):
            sync_folder(self.path.parent)
            _remove(self.folder)
        else:
            _remove(previous)
            os.rename(self.path, previous)
            os.rename(self.folder, self.path)
        sync_folder(self.path.parent)
        _remove(previous)

    def abandon(self) -> None:
        """Removes what was written of a dump that has failed."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where that cannot be done."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(second))
