"""``dynamicemb get``: rows of single ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dynamicemb.cli.arguments import CheckpointPath, Json

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from dynamicemb.checkpoint.files.reader import StoredTable

__all__ = ["get", "parsed_key"]


@dataclass(frozen=True)
class _Answer:
    """What a checkpoint says about one key.

    Attributes:
        asked: the key as it was typed.
        key: as it is stored, int64.
        row: its number; None if it has none.
        gone: whether a delta says that it was evicted or erased.
        arrays: its parts but for the key, by name, each [width].
    """

    asked: str
    key: int
    row: Optional[int]
    gone: bool
    arrays: dict[str, np.ndarray]


def get(
    path: CheckpointPath,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Its name, or COLLECTION/NAME.", show_default=False)],
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY", help="Ids: any integers of 64 bits, signed or unsigned.", show_default=False),
    ],
    json: Json = False,
) -> None:
    """Show the rows of single ids: score, embedding, optimizer state. Ends with exit code 1 if an id has no row.

    A binary search in the file of keys, about 30 small reads for each id whatever the size of the table. Ids from 2**63
    on mean the negative numbers of the same bits. Checksums are not looked at.

    [bold]Example:[/bold] dynamicemb get /data/checkpoint item 42 -3 18446744073709551615
    """
    from dynamicemb.checkpoint.files.reader import Checkpoint
    from dynamicemb.cli.console import print_json, screen

    numbers = [parsed_key(key) for key in keys]
    with Checkpoint(path) as checkpoint:
        stored = checkpoint.table(table)
        answers = [_answer(stored, asked, key) for asked, key in zip(keys, numbers)]
        if json:
            print_json(_document(stored, answers))
        else:
            console = screen()
            for answer in answers:
                _show(console, stored, answer)
    if any(answer.row is None for answer in answers):
        raise typer.Exit(1)


def parsed_key(text: str) -> int:
    """The int64 key that ``text`` means; numbers from 2**63 to 2**64 - 1 keep their bits.

    Raises:
        typer.BadParameter: it is not an integer of 64 bits.
    """
    try:
        key = int(text)
    except ValueError:
        kind = "option" if text.startswith("-") else "integer"
        raise typer.BadParameter(f"{text!r} is not an {kind}", param_hint="KEY") from None
    if not -(2**63) <= key < 2**64:
        raise typer.BadParameter(f"{text} does not fit in 64 bits", param_hint="KEY")
    return key - 2**64 if key >= 2**63 else key


def _answer(stored: StoredTable, asked: str, key: int) -> _Answer:
    from dynamicemb.checkpoint.files.schema import KEYS
    from dynamicemb.checkpoint.formats.exchange import as_float32

    row = stored.find(key)
    if row is None:
        return _Answer(asked, key, None, _has_gone(stored, key), {})
    arrays = {}
    for part in stored.record.schema.parts:
        if part.name != KEYS:
            values = stored.read_part(part.name, row, row + 1).reshape(-1)
            arrays[part.name] = values if part.dtype == "int64" else as_float32(values, part.dtype)
    return _Answer(asked, key, row, False, arrays)


def _has_gone(stored: StoredTable, key: int) -> bool:
    import numpy as np

    from dynamicemb.checkpoint.files.schema import EVICTED, mixed_keys

    if not stored.record.evicted_rows:
        return False
    row = stored.position(int(mixed_keys(np.array([key], np.int64))[0]), EVICTED)
    return row < stored.record.evicted_rows and int(stored.read_part(EVICTED, row, row + 1)[0]) == key


def _document(stored: StoredTable, answers: list[_Answer]) -> dict[str, Any]:
    rows = []
    for answer in answers:
        entry: dict[str, Any] = {"asked": answer.asked, "key": answer.key, "found": answer.row is not None}
        if answer.row is None:
            entry["gone"] = answer.gone
        else:
            parts = {name: array.tolist() for name, array in answer.arrays.items()}
            entry |= {"row": answer.row, "score": parts.pop("scores")[0], **parts}
        rows.append(entry)
    return {"path": str(stored.folder), "collection": stored.collection, "table": stored.table, "rows": rows}


def _show(console: Console, stored: StoredTable, answer: _Answer) -> None:
    from dynamicemb.cli.console import count

    key = f"[bold]{answer.asked}[/bold]" + (f" (stored as {answer.key})" if str(answer.key) != answer.asked else "")
    if answer.row is None:
        what = "gone: evicted or erased before this delta was written" if answer.gone else "absent"
        console.print(f"{key}  [red]{what}[/red]")
        return
    score = int(answer.arrays["scores"][0])
    console.print(f"{key}  score {count(score)}, row {count(answer.row)} of {count(stored.rows)}")
    for name, values in answer.arrays.items():
        if name != "scores":
            _show_numbers(console, name, values)


def _show_numbers(console: Console, name: str, values: np.ndarray) -> None:
    """All of them, in columns, as many as fit."""
    shown = [f"{value:.6g}" for value in values.tolist()]
    width = max(len(number) for number in shown) + 2
    columns = max(1, (console.width - 4) // width)
    console.print(f"  [dim]{name}[/dim]")
    for first in range(0, len(shown), columns):
        line = "".join(number.rjust(width) for number in shown[first : first + columns])
        console.print(f"  {line}", no_wrap=True, overflow="ignore")
