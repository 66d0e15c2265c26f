"""One object of a JSON document from elsewhere: every field is checked for its kind and range before it is used."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from dynamicemb.errors import CheckpointError
from dynamicemb.names import unstorable

__all__ = ["Entry", "hexadecimal"]


@dataclass(frozen=True)
class Entry:
    """An object of the manifest and where it is, for messages."""

    path: Path
    where: str
    value: dict[str, Any]

    def error(self, message: str) -> CheckpointError:
        at = f"{self.where}: " if self.where else ""
        return CheckpointError(f"{self.path}: {at}{message}; the manifest is damaged: restore it from a copy")

    def check_name(self, name: str) -> None:
        """Names are parts of paths; one that would lead elsewhere is refused."""
        if reason := unstorable(name):
            raise self.error(f"{name!r} cannot be a name: {reason}")

    def names(self) -> list[str]:
        return list(self.value)

    def _get(self, name: str, kind: type, described: str) -> Any:
        value = self.value.get(name)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise self.error(
                f"{name!r} is {value!r}, not {described}" if name in self.value else f"{name!r} is missing"
            )
        return value

    def mapping(self, name: str) -> Entry:
        return Entry(self.path, f"{self.where}.{name}".lstrip("."), self._get(name, dict, "an object"))

    def sequence(self, name: str) -> list[Any]:
        return self._get(name, list, "an array")

    def string(self, name: str) -> str:
        return self._get(name, str, "a string")

    def boolean(self, name: str) -> bool:
        return self._get(name, bool, "true or false")

    def integer(self, name: str, lower: int, upper: int = 2**63 - 1) -> int:
        value = self._get(name, int, "an integer")
        if not lower <= value <= upper:
            raise self.error(f"{name!r} is {value}, outside [{lower}, {upper}]")
        return value

    def optional_integer(self, name: str, lower: int) -> Optional[int]:
        return None if self.value.get(name) is None else self.integer(name, lower)

    def integers(self, name: str, lower: int, upper: int) -> list[int]:
        values = self.sequence(name)
        if any(type(value) is not int or not lower <= value <= upper for value in values):
            raise self.error(f"{name!r} is {values}, not integers in [{lower}, {upper}]")
        return values

    def number(self, name: str) -> float:
        value = self.value[name]
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(f"{name!r} is {value!r}, not a finite number")
        return float(value)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.string(name)
        if value not in allowed:
            raise self.error(f"{name!r} is {value!r}, not {' or '.join(allowed)}")
        return value

    def hexadecimal(self, name: str, digits: int) -> int:
        return hexadecimal(self, name, self.string(name), digits)


def hexadecimal(entry: Entry, name: str, text: object, digits: int) -> int:
    if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", text):
        raise entry.error(f"{name!r} has {text!r}, not {digits} hexadecimal digits")
    return int(text, 16)
