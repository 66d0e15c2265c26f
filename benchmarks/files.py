"""Files of results: the revision that they belong to, tables in Markdown, and writing them whole or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Optional

__all__ = ["markdown_table", "revision", "write_texts"]


def revision() -> Optional[str]:
    """The commit of the sources, marked if they have been changed since; None outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; cells may hold any text."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def write_texts(folder: Path, stem: str, texts: Mapping[str, str]) -> list[Path]:
    """Writes ``texts`` (by suffix) as ``folder/stem + suffix``; each file appears whole or not at all.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix, text in texts.items():
        file = folder / f"{stem}{suffix}"
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, file)
        files.append(file)
    return files
