"""A checkpoint that a table has been written to or read from, as the table remembers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

__all__ = ["Ancestor"]


@dataclass(frozen=True)
class Ancestor:
    """A state that a table was in, and how it can be recognised.

    Attributes:
        step: clock of the table then.
        digest: of what a checkpoint says of the table, 32 hexadecimal digits; None: the state came from elsewhere, a
            state dict for instance, and any checkpoint of that step may be of it.
    """

    step: int
    digest: Optional[str]
