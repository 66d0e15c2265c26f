"""Dynamic embedding tables for TorchRec: GPU and CPU hash tables behind one flag in a table's constraints.

Importing this package needs no GPU, no compiler and no torchrec. The classes that torchrec works with are in
:mod:`dynamicemb.planner` and :mod:`dynamicemb.shard`.
"""

from dynamicemb.errors import (
    CapacityError,
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

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
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
