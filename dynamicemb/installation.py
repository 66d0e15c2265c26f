"""What is installed beside this package, and whether it fits together: checked before torchrec is imported.

fbgemm, whose operators torchrec calls, is compiled against one release of torch, and its metadata do not say which.
With any other release its import ends in an undefined symbol. So the pair is looked up first, in what pip wrote down.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Optional

import torch

from dynamicemb.errors import InstallationError

__all__ = ["FBGEMM_BY_TORCH", "TORCHREC", "require_torchrec"]

#: The release of fbgemm that was built for a release of torch; patch releases of both are interchangeable.
#: Source: https://docs.pytorch.org/FBGEMM/general/Releases.html. docs/compatibility.md says which pairs were run.
FBGEMM_BY_TORCH = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}
#: torchrec has no compiled part: each of these works with every pair above.
TORCHREC = ">=1.6,<1.10"

# Two distributions of one module: with CUDA, and without.
_CUDA_BUILD, _CPU_BUILD = "fbgemm-gpu", "fbgemm-gpu-cpu"


def require_torchrec() -> None:
    """Imports fbgemm, if what is installed fits together, so that torchrec can be imported next.

    Raises:
        InstallationError: fbgemm or torchrec is missing or incomplete, fbgemm was built for another torch, or two
            builds of fbgemm share their files. Names the versions, and the command that mends it.
    """
    builds = {name: version for name in (_CUDA_BUILD, _CPU_BUILD) if (version := _version(name)) is not None}
    if len(builds) > 1:
        both = " and ".join(f"{name} {version}" for name, version in builds.items())
        raise InstallationError(
            f"{both} are installed together, and each has overwritten files of the other; "
            f"run: pip uninstall --yes {' '.join(builds)} && {_install_fbgemm()}"
        )
    for name, version in builds.items():
        built_for, own = _torch_of(version), _release(torch.__version__)
        if built_for and own in FBGEMM_BY_TORCH and own != built_for:
            raise InstallationError(
                f"{name} {version} was built for torch {built_for}, and torch {torch.__version__} is installed; "
                f"run: {_install_fbgemm(name)}"
            )
    _import_fbgemm(builds)
    _check_torchrec()


def _version(distribution: str) -> Optional[str]:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> Optional[str]:
    """``2.13`` of ``2.13.0+cpu``; None of nightly builds and of what somebody compiled: no table knows those."""
    match = re.fullmatch(r"(\d+\.\d+)(\.\d+)*(\.post\d+)?(\+(cpu|cu\d+|rocm[\d.]+|xpu))?", version)
    return match[1] if match else None


def _torch_of(fbgemm: str) -> Optional[str]:
    """The release of torch that a version of fbgemm was built for, if that is known."""
    return next((torch for torch, release in FBGEMM_BY_TORCH.items() if release == _release(fbgemm)), None)


def _install_fbgemm(build: Optional[str] = None, *options: str) -> str:
    """The command that installs the fbgemm which fits: the same build as before, else what this machine can use."""
    build = build or (_CUDA_BUILD if torch.cuda.is_available() else _CPU_BUILD)
    own = _release(torch.__version__)
    if own in FBGEMM_BY_TORCH:
        wanted = [f'"{build}=={FBGEMM_BY_TORCH[own]}.*"']
    else:
        newest, release = list(FBGEMM_BY_TORCH.items())[-1]
        wanted = [f'"torch=={newest}.*"', f'"{build}=={release}.*"']
    return " ".join(["pip install", *options, *wanted])


def _import_fbgemm(builds: dict[str, str]) -> None:
    if importlib.util.find_spec("fbgemm_gpu") is None and not builds:
        raise InstallationError(f"fbgemm is not installed, which torchrec needs; run: {_install_fbgemm()}")
    try:
        with _held_back_log() as log:
            importlib.import_module("fbgemm_gpu")
    except (ImportError, OSError, RuntimeError) as error:
        name, version = next(iter(builds.items()), ("fbgemm", "of no known version"))
        # A CUDA build beside a torch without CUDA lacks torch's own CUDA libraries.
        build = name if builds and torch.version.cuda else None
        reason = " ".join(str(error.__cause__ or error).split())
        known = _release(torch.__version__) in FBGEMM_BY_TORCH
        remedy = _install_fbgemm(build, *(("--force-reinstall", "--no-deps") if known else ()))
        if build is None and name == _CUDA_BUILD:
            remedy = f"pip uninstall --yes {name} && {remedy}"
        raise InstallationError(
            f"{name} {version} cannot be loaded with torch {torch.__version__} ({reason}); run: {remedy}"
        ) from None
    # Some releases do not know the pair that they were built for, and say so once for each of their libraries.
    if not any(_torch_of(version) == _release(torch.__version__) for version in builds.values()):
        for record in log:
            logging.root.handle(record)


@contextmanager
def _held_back_log() -> Iterator[list[logging.LogRecord]]:
    """What fbgemm logs while it is imported. If the import fails, one error says all of it."""
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logging.root.addFilter(hold)
    try:
        yield records
    finally:
        logging.root.removeFilter(hold)


def _check_torchrec() -> None:
    version = _version("torchrec")
    command = f'pip install --no-deps "torchrec{TORCHREC}"'
    if importlib.util.find_spec("torchrec") is None:
        raise InstallationError(f"torchrec is not installed; run: {command}")
    if version is None:  # a source tree on the path: nobody has written down what it needs
        return
    oldest = TORCHREC.removeprefix(">=").partition(",")[0]
    if (own := _release(version)) and _numbers(own) < _numbers(oldest):
        raise InstallationError(f"torchrec {version} is older than {oldest}; run: {command}")
    missing = {name: wanted for name, wanted in _libraries("torchrec").items() if _version(name) is None}
    if missing:
        wanted = " ".join(f'"{text}"' for text in missing.values())
        raise InstallationError(f"torchrec {version} needs {', '.join(missing)}; run: pip install {wanted}")


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def _libraries(distribution: str) -> dict[str, str]:
    """What a distribution asks for by name, without its extras, and without fbgemm, which has two builds."""
    wanted = [line.partition(";") for line in metadata.requires(distribution) or []]
    texts = [text.strip() for text, _, marker in wanted if "extra" not in marker]
    names = {match[0]: text for text in texts if (match := re.match(r"[\w.-]+", text))}
    return {name: text for name, text in names.items() if not re.match("fbgemm", name, re.IGNORECASE)}
