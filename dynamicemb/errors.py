"""The errors a user of dynamicemb can meet.

Each message says what is wrong, where, what the limit is, and what to do about it. Every class also derives from the
built-in exception that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "DataError",
    "DynamicEmbError",
    "DynamicEmbWarning",
    "InstallationError",
    "KeyTypeError",
    "OutOfMemoryError",
    "RemoteRankError",
    "UnknownHyperparameterError",
]


class DynamicEmbError(Exception):
    """Base of every error raised on purpose by dynamicemb."""


class ConfigError(DynamicEmbError, ValueError):
    """An option, a constraint or a combination of them that cannot be honoured. Nothing has been allocated yet."""


class InstallationError(DynamicEmbError, ImportError):
    """What is installed does not fit together. The message names the versions and the command that mends it."""


class UnknownHyperparameterError(ConfigError, NotImplementedError):
    """The name of a hyperparameter that tables do not have; fbgemm raises a ``NotImplementedError`` for it, too."""


class KeyTypeError(DynamicEmbError, TypeError):
    """Ids whose dtype is not an integer of 32 or 64 bits. The table is unchanged."""


class DataError(DynamicEmbError, ValueError):
    """A data file that is missing or malformed, or a batch that contradicts itself or the collection that it is for.

    The message names the path and, where there is one, the row; or the features and their numbers.
    """


class CheckpointError(DynamicEmbError, ValueError):
    """A checkpoint that is damaged, incomplete, foreign or does not fit the model, or a place where none can be
    written. The message names the file, the offset where there is one, and the remedy. The model is unchanged."""


class CapacityError(DynamicEmbError, RuntimeError):
    """Keys found no place in their bucket and ``safe_check_mode`` is ERROR. Raised on every rank of the group."""


class CollectiveError(DynamicEmbError, RuntimeError):
    """A call that all ranks make together, and that others did not make within the time-out of their process group, or
    in which one of them no longer takes part."""


class OutOfMemoryError(DynamicEmbError, RuntimeError, MemoryError):
    """Memory of a table that the device has no room for. The message says for what, how much, and what there is.

    Tables that could not be made or loaded raise on every rank. A table that could not grow is as it was before the
    batch, and raises on its rank alone, in the middle of the forward pass: other ranks notice when its process ends."""


class RemoteRankError(DynamicEmbError, RuntimeError):
    """Another rank rejected its input; raised here as well, so that no rank is left waiting in a collective."""


class DynamicEmbWarning(UserWarning):
    """Category of every warning issued by dynamicemb, so that it can be filtered as one."""
