"""Where compiled CPU kernels are kept, and the one line that is said before they have to be compiled."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
from numba.core import caching

__all__ = ["kernel_cache"]

_logger = logging.getLogger("dynamicemb")


def _source_stamp() -> str:
    """A digest of every kernel source. Numba checks only the file of the kernel itself, and would keep machine code
    that has an outdated function of another file compiled into it. It also checks when that file was written, which
    would throw away what was compiled before the same sources were installed again."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _source_stamp()
# Numba has dropped the underscore in one of the versions that are supported.
_InTree: Any = getattr(caching, "InTreeCacheLocator", None) or caching._InTreeCacheLocator


class _Installed(_InTree):
    """The folder beside the sources although it cannot be written: what is there can still be read."""

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Any:
        return cls(function, file)


class _KernelCacheImpl(caching.CompileResultCacheImpl):
    # Numba's places need to be writable. Ours is the last one, so there always is a place.
    _locator_classes = [*caching.CompileResultCacheImpl._locator_classes, _Installed]  # noqa: RUF012


class _KernelCache(caching.FunctionCache):
    """Numba's cache, which also reads what lies beside the sources when it may not write there.

    Whoever installs the package (an administrator, the build of an image) can thus compile for those who use it.
    """

    _impl_class = _KernelCacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _STAMP
        beside = _Installed(function, function.__code__.co_filename).get_cache_path()
        self._installed = caching.IndexDataCacheFile(beside, self._impl.filename_base, _STAMP)

    def _load_overload(self, signature: Any, target: Any) -> Any:
        result = super()._load_overload(signature, target)
        if result is None and self._installed._index_path != self._cache_file._index_path:
            stored = self._installed.load(self._index_key(signature, target.codegen()))
            result = None if stored is None else self._impl.rebuild(target, stored)
        if result is None:
            _announce(None if isinstance(self._impl.locator, _Installed) else Path(self.cache_path))
        return result

    def _save_overload(self, signature: Any, result: Any) -> None:
        with contextlib.suppress(OSError):  # no place to write, or no room: the next process compiles again
            super()._save_overload(signature, result)


class _NoCache(caching.NullCache):
    def load_overload(self, signature: Any, target: Any) -> None:
        _announce(None)


def kernel_cache(function: Callable[..., Any]) -> Any:
    """The cache of the kernel ``function``, for Numba's dispatcher."""
    try:
        return _KernelCache(function)
    except (AttributeError, RuntimeError, OSError):  # another Numba inside: compile anew in each process
        return _NoCache()


_announced = False


def _announce(place: Optional[Path]) -> None:
    """Says once in a process, and in one process of each machine, why the first step takes so long.

    Through the logger ``dynamicemb``: what nobody has configured appears on stderr. ``place`` is where the kernels of
    one folder are kept; None: nowhere.
    """
    global _announced
    if _announced:
        return
    _announced = True
    joined = dist.is_available() and dist.is_initialized()
    if int(os.environ.get("LOCAL_RANK") or (dist.get_rank() if joined else 0)):
        return
    when = "in each process: no place to keep the result can be written, so set NUMBA_CACHE_DIR to one that can"
    if place is not None:
        folder = place.parent.parent if place.name == "__pycache__" else place.parent
        when = f"once: the result is kept under {folder}"
    _logger.warning("dynamicemb: compiling CPU kernels for this machine, some seconds of one processor, %s", when)
