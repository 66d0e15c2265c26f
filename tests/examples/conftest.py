"""The examples as modules, and small logs on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# The demo runs by path, so its modules import each other by their bare names.
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def tsv_file(tmp_path: Path) -> Callable[[list[list[str]]], Path]:
    """Writes rows of fields in the tab-separated Criteo layout."""

    def write(rows: list[list[str]], name: str = "log.tsv") -> Path:
        path = tmp_path / name
        path.write_text("".join("\t".join(fields) + "\n" for fields in rows))
        return path

    return write
