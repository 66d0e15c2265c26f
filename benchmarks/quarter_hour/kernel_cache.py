"""Compiled kernels that travel: packed where they were compiled, and installed where a launch will look for them.

Triton finds a compiled kernel under a hash of four things: Triton's own files, its compiled library among them; the
kernel's source with its types and constants; the version of the assembler; the options. Triton's files differ between
builds of one version (there is one for each Python), the code that they generate does not. And an entry holds the
absolute paths of its own files. So an entry travels without the first part of its key and without paths, and gets those
of the machine that it is installed on. Another version of Triton is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.runtime import cache

__all__ = ["Installed", "OtherTritonError", "Packed", "install", "pack"]

MANIFEST = "manifest.json"
#: Code and metadata: all that a launch reads.
KEPT = (".cubin", ".json")
_GROUP = "__grp__"


class OtherTritonError(Exception):
    """The kernels were compiled by another version than the one that is to launch them."""


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` wrote: number of kernels, and bytes of the archive."""

    kernels: int
    num_bytes: int


@dataclass(frozen=True)
class Installed:
    """What :func:`install` did.

    Attributes:
        kernels: in the archive; all of them are in the folder now.
        same_build: whether Triton's own files are those of the installation that compiled them.
    """

    kernels: int
    same_build: bool


def pack(keys: Iterable[str], archive: Path) -> Packed:
    """Writes the entries of Triton's cache that have these keys.

    Args:
        keys: as :func:`triton.runtime.cache.get_cache_key` returns them.
        archive: a ``.tar.xz`` file, which appears whole or not at all.
    """
    own, entries = cache.triton_key(), []
    temporary = archive.with_name(archive.name + ".tmp")
    with tarfile.open(temporary, "w:xz") as tar:
        for number, key in enumerate(sorted(set(keys))):
            assert key.startswith(own)
            for file in _files(_folder_of(key)):
                _add(tar, f"{number}/{file.name}", file.read_bytes())
            entries.append(key.removeprefix(own))
        manifest = {"triton": triton.__version__, "build": _digest(own), "entries": entries}
        _add(tar, MANIFEST, json.dumps(manifest).encode())
    os.replace(temporary, archive)
    return Packed(len(entries), archive.stat().st_size)


def _files(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in KEPT and not file.name.startswith(_GROUP)]
    assert len(files) == len(KEPT), f"{folder}: {[file.name for file in files]}"
    return files


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folder_of(key: str) -> Path:
    """Where the cache of this process has the entry."""
    manager: Any = cache.get_cache_manager(_digest(key))
    return Path(manager.cache_dir)


def install(archive: Path) -> Installed:
    """Puts the kernels where launches of a process with this Triton and ``TRITON_CACHE_DIR`` look for them.

    Raises:
        OtherTritonError: they were compiled by another version.
    """
    own = cache.triton_key()
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
        folder = Path(temporary)
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["triton"] != triton.__version__:
            raise OtherTritonError(
                f"{archive.name} was compiled by Triton {manifest['triton']}, and this one is {triton.__version__}: "
                f"make it again with that version"
            )
        for number, rest in enumerate(manifest["entries"]):
            _install_entry(folder / str(number), own + rest)
    return Installed(len(manifest["entries"]), manifest["build"] == _digest(own))


def _install_entry(files: Path, key: str) -> None:
    target = _folder_of(key)
    for file in _files(files):
        if file.suffix == ".json":
            metadata = {**json.loads(file.read_text()), "hash": _digest(key)}
            file.write_text(json.dumps(metadata))
            name = file.name
        shutil.copy(file, target / file.name)
    # Last: with the list of its files, the entry is there.
    children = {file.name: str(target / file.name) for file in _files(files)}
    (target / f"{_GROUP}{name}").write_text(json.dumps({"child_paths": children}))
