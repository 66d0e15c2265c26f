"""How many examples Hypothesis tries: a number chosen for the gate, and so many times more under ``make explore``."""

from __future__ import annotations

from hypothesis import settings

__all__ = ["examples"]

_DEFAULT_EXAMPLES = 100  # Hypothesis's own default, which the profile of the gate keeps


def examples(number: int) -> int:
    """``number`` in the gate; multiplied as the default number is in another profile, such as ``explore``."""
    return number * settings.default.max_examples // _DEFAULT_EXAMPLES
