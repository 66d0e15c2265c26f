"""The version of the package; checkpoints carry it."""

__version__ = "0.1.0"
