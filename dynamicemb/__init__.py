"""Dynamic embedding tables for TorchRec: GPU and CPU hash tables behind one flag in a table's constraints.

Importing this package needs no GPU, no compiler and no torchrec; not even torch is loaded before a name is used that
needs it, so that the command starts at once. The classes that torchrec works with are in
:mod:`dynamicemb.planner` and :mod:`dynamicemb.shard`; checkpoints are in :mod:`dynamicemb.checkpoint`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dynamicemb.errors import (
    CapacityError,
    CheckpointError,
    CollectiveError,
    ConfigError,
    DataError,
    DynamicEmbError,
    DynamicEmbWarning,
    InstallationError,
    KeyTypeError,
    OutOfMemoryError,
    RemoteRankError,
)
from dynamicemb.version import __version__

if TYPE_CHECKING:
    from dynamicemb.options import (
        DynamicEmbCheckMode,
        DynamicEmbEvictStrategy,
        DynamicEmbInitializerArgs,
        DynamicEmbInitializerMode,
        DynamicEmbTableOptions,
    )

# Loaded on first use.
_LAZY = {
    "DynamicEmbCheckMode": "dynamicemb.options",
    "DynamicEmbDump": "dynamicemb.checkpoint.dump",
    "DynamicEmbEvictStrategy": "dynamicemb.options",
    "DynamicEmbInitializerArgs": "dynamicemb.options",
    "DynamicEmbInitializerMode": "dynamicemb.options",
    "DynamicEmbLoad": "dynamicemb.checkpoint.load",
    "DynamicEmbTableOptions": "dynamicemb.options",
    "incremental_dump": "dynamicemb.checkpoint.incremental",
}

__all__ = [
    "CapacityError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "DataError",
    "DynamicEmbCheckMode",
    "DynamicEmbDump",
    "DynamicEmbError",
    "DynamicEmbEvictStrategy",
    "DynamicEmbInitializerArgs",
    "DynamicEmbInitializerMode",
    "DynamicEmbLoad",
    "DynamicEmbTableOptions",
    "DynamicEmbWarning",
    "InstallationError",
    "KeyTypeError",
    "OutOfMemoryError",
    "RemoteRankError",
    "__version__",
    "incremental_dump",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
