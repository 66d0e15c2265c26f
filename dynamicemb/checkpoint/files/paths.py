"""Where paths come in: folders and files of this machine, or of a file system that it has mounted, and nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dynamicemb.errors import ConfigError

__all__ = ["PathLike", "local_path"]

PathLike = str | os.PathLike[str]

#: ``s3://bucket``, ``file:///data``, ``simplecache::s3://bucket``; and ``s3:/bucket``, which is what pathlib makes of
#: the first. A name such as ``a:b``, or ``C:/b``, is none.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*::)*([A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z][A-Za-z0-9+.-]+:/)")
_COPY = "write to a local or shared folder and copy it, or copy it to one before it is read"


def local_path(path: PathLike, argument: str = "path", instead: str = _COPY) -> Path:
    """The path that a caller means; ``~`` at its beginning is the home folder, as in a shell.

    Args:
        path: as it was given.
        argument: what the caller calls it.
        instead: what to do where it is a URL.

    Raises:
        ConfigError: it is no path: of another type, empty, with a zero byte in it, or a URL.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ConfigError(f"{argument}={path!r} is {type(path).__name__}, not a path; give a str or a pathlib.Path")
    if not text or "\0" in text:
        raise ConfigError(f"{argument}={text!r} is not a path: it is empty, or has a zero byte in it; give a folder")
    if text.lower().startswith("file:/"):
        raise ConfigError(f"{argument}={text!r} is a URL; give the plain path, such as {'/' + text[5:].lstrip('/')!r}")
    if _URL.match(text):
        raise ConfigError(
            f"{argument}={text!r} is a URL, and checkpoints are on file systems only; {instead} (a local folder of "
            "this name needs its absolute path)"
        )
    return Path(os.path.expanduser(text))
