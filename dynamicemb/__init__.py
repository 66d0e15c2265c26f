"""Dynamic embedding tables for TorchRec: GPU and CPU hash tables behind one flag in a table's constraints.

Importing this package needs no GPU, no compiler and no torchrec. The classes that torchrec works with are in
:mod:`dynamicemb.planner` and :mod:`dynamicemb.shard`.
"""

from dynamicemb.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DataError,
    DynamicEmbError,
    DynamicEmbWarning,
    KeyTypeError,
    RemoteRankError,
)
from dynamicemb.options import (
    DynamicEmbCheckMode,
    DynamicEmbEvictStrategy,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
)
from dynamicemb.version import __version__

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DynamicEmbCheckMode",
    "DynamicEmbError",
    "DynamicEmbEvictStrategy",
    "DynamicEmbInitializerArgs",
    "DynamicEmbInitializerMode",
    "DynamicEmbTableOptions",
    "DynamicEmbWarning",
    "KeyTypeError",
    "RemoteRankError",
    "__version__",
]
