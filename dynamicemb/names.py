"""Names of tables, files and the like: in the order in which a person counts, and in sentences of bounded length."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["listed", "natural_order"]

#: Names that a sentence has room for.
_LISTED = 12
_DIGITS = re.compile(r"([0-9]+)")
_NaturalKey = tuple[list[tuple[str, int, str]], str]


def natural_order(name: str) -> _NaturalKey:
    """What to sort names by so that digits in them count as numbers: ``c1``, ``c2``, ``c10``.

    The name itself decides between names that differ only in leading zeros.
    """
    pieces = _DIGITS.split(name)
    # A number by its length and digits: int() refuses thousands of digits, which a damaged manifest may have.
    numbers = [digits.lstrip("0") for digits in pieces[1::2]]
    return [(text, len(digits), digits) for text, digits in zip(pieces[::2], [*numbers, ""])], name


def listed(names: Iterable[str], limit: int = _LISTED) -> str:
    """``names`` separated by commas, in their order; of more than ``limit``, the first ones and how many others."""
    every = list(names)
    if len(every) <= limit:
        return ", ".join(every)
    return f"{', '.join(every[: limit - 1])} and {len(every) - limit + 1:,} more"
