"""The one place that picks an engine: by the tensors' device, or by ``DYNAMICEMB_ENGINE`` for tests.

``DYNAMICEMB_ENGINE=triton`` together with ``TRITON_INTERPRET=1`` runs the Triton kernels on host tensors.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from dynamicemb.errors import ConfigError

__all__ = ["ENGINE_VARIABLE", "engine_name", "host_implementation", "implementation"]

ENGINE_VARIABLE = "DYNAMICEMB_ENGINE"


def engine_name(device: torch.device) -> str:
    """``"cpu"`` for host tensors, ``"triton"`` for any other device, unless the environment forces one.

    Raises:
        ConfigError: ``DYNAMICEMB_ENGINE`` is neither ``cpu`` nor ``triton``, or asks the CPU engine to work on tensors
            that are not in host memory.
    """
    forced = os.environ.get(ENGINE_VARIABLE, "")
    if forced not in ("", "cpu", "triton"):
        raise ConfigError(f"{ENGINE_VARIABLE}={forced} is not an engine; use cpu or triton, or unset it")
    if forced == "cpu" and device.type != "cpu":
        raise ConfigError(f"{ENGINE_VARIABLE}=cpu cannot work on tensors on {device}; unset it, or shard to the CPU")
    return forced or ("cpu" if device.type == "cpu" else "triton")


@functools.cache
def _module(operation: str, engine: str) -> ModuleType:
    return importlib.import_module(f"{operation}.{engine}")


def implementation(operation: str, device: torch.device) -> ModuleType:
    """The module that implements ``operation`` (a kernel package's ``__name__``) for tensors on ``device``."""
    return _module(operation, engine_name(device))


def host_implementation(operation: str) -> ModuleType:
    """The CPU engine's module, whatever is forced: for what is prepared in host memory and has no tables yet."""
    return _module(operation, "cpu")
