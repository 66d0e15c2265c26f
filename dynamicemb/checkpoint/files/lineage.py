"""Which checkpoints belong together: each says which ones its table has been through.

A table is known by the digest of what the manifest says of it, which contains the checksums of its files and the
digests of what it follows. So two runs differ from the first checkpoint on in which their rows do, although their ids,
steps and settings are the same, and two runs that go on from one checkpoint differ from the next one on. Nothing in it
depends on the time, on chance or on the number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Optional

from dynamicemb.checkpoint.files.manifest import TableRecord
from dynamicemb.table.ancestor import Ancestor

__all__ = [
    "History",
    "adopted",
    "advanced",
    "ancestor_of",
    "continues",
    "described",
    "followed",
    "history_of",
    "is_in",
    "merged_history",
]

History = tuple[Ancestor, ...]
#: Ancestors that a message names.
_NAMED = 3


def ancestor_of(record: TableRecord, table: str) -> Ancestor:
    return Ancestor(record.clock, record.digest(table))


def followed(history: Iterable[Ancestor], record: TableRecord, table: str) -> History:
    """What a checkpoint says that it follows: a delta, everything in ``history`` that it may be applied to; a full one,
    the first that was of its own state, by which all those that are written of one state name the same.

    A checkpoint that is written once more, with nothing trained in between, says what the first one says.

    Args:
        history: all that is known of the table's past, oldest first.
        record: of the checkpoint, complete but for this.
        table: its name.
    """
    if record.since is None:
        known = tuple(one for one in history if one.step == record.clock and one.digest is not None)[:1]
    else:
        known = tuple(one for one in history if one.step >= record.since)
    for number, one in enumerate(known):
        before = known[:number]
        if one.step == record.clock and one.digest == dataclasses.replace(record, follows=before).digest(table):
            return before
    return known


def advanced(history: History, record: TableRecord, table: str) -> History:
    """The past of a table once ``record`` has been written: a full one tells what a state from elsewhere was."""
    own = ancestor_of(record, table)
    if own in history:
        return history
    told = Ancestor(record.clock, None) if record.since is None else None
    return (*(one for one in history if one != told), own)


def adopted(history: History, record: TableRecord, table: str) -> History:
    """The past of a table that is said to have been in the state of ``record``, where its own history cannot tell."""
    own = ancestor_of(record, table)
    if own in history:
        return history
    rest = (one for one in history if one != Ancestor(record.clock, None))
    return tuple(sorted([own, *rest], key=lambda one: one.step))


def history_of(records: Sequence[TableRecord], table: str) -> History:
    """The past of a table that a checkpoint, or a chain of them, stands for: all that they followed, and they
    themselves, oldest first."""
    history: dict[Ancestor, None] = {}
    for record in records:
        history |= dict.fromkeys([*(record.follows or ()), ancestor_of(record, table)])
    return tuple(history)


def merged_history(records: Sequence[TableRecord], table: str) -> Optional[History]:
    """What the checkpoint that a chain is merged to comes from; None if that is not known: of a full one, the last must
    tell, of a delta all of them."""
    told = records[-1:] if records[0].since is None else records
    return None if any(record.follows is None for record in told) else history_of(records, table)


def continues(previous: TableRecord, delta: TableRecord, table: str) -> bool:
    """Whether ``delta`` was written by a run that has been through the state of ``previous``; True if one of them does
    not tell, as those that were written before lineages were."""
    return delta.follows is None or is_in(previous, (*delta.follows, ancestor_of(delta, table)), table)


def is_in(record: TableRecord, history: Iterable[Ancestor], table: str) -> bool:
    """Whether a table with this history has been in the state of ``record``; True if ``record`` does not tell."""
    if record.follows is None:
        return True
    own = {ancestor_of(record, table), *(one for one in record.follows if one.step == record.clock)}
    return any(one in own or one == Ancestor(record.clock, None) for one in history)


def described(history: Sequence[Ancestor]) -> str:
    """For messages."""
    named = [f"{one.digest or 'a state dict'} of step {one.step}" for one in history[-_NAMED:]]
    more = f" and {len(history) - _NAMED} before" if len(history) > _NAMED else ""
    return (", ".join(named) or "none") + more
