"""Names of tables, collections and the like: which of them a checkpoint can hold, in the order in which a person
counts, and in sentences of bounded length."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Optional

__all__ = ["MAX_COLLECTION_BYTES", "MAX_TABLE_BYTES", "did_you_mean", "listed", "natural_order", "unstorable"]

#: Names are parts of the names of files, which have 255 bytes: that of a table is followed by ``_opt_exp_avg_sq``, and
#: by numbers of ranks in dumps for others.
MAX_TABLE_BYTES, MAX_COLLECTION_BYTES = 200, 255

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


def unstorable(name: str, max_bytes: Optional[int] = None) -> Optional[str]:
    """Why the name of a table or a collection cannot be part of the name of a file in a checkpoint; None: it can.

    Args:
        name: with any other character: spaces, dots, quotes, letters of any language.
        max_bytes: how many bytes it may have in UTF-8; None: any number.
    """
    if name in ("", ".", ".."):
        return "it is empty, '.' or '..'"
    if "/" in name or "\0" in name:
        return "it has a '/' or a zero byte in it"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if max_bytes is not None and size > max_bytes:
        return f"it has {size} bytes in UTF-8, and {max_bytes} is the limit"
    return None


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'item'?)`` where one of ``known`` resembles ``name``, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
