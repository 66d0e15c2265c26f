"""torchrec's trackers of what a step has looked up, which cannot see into a hash table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dynamicemb.errors import ConfigError

__all__ = ["refuse_delta_tracker", "refuse_tracker"]

_DELTA_TRACKER = "torchrec.distributed.model_tracker.model_delta_tracker"


def refuse_tracker(tables: Sequence[str]) -> None:
    """Raises if any of the collection's tables are dynamic.

    Raises:
        ConfigError: names the tables and what takes the place of a tracker.
    """
    if tables:
        raise ConfigError(
            f"torchrec's delta tracker and other trackers of lookups cannot follow the dynamic tables "
            f"{', '.join(tables)}: they know rows by their position, and these have none. "
            "dynamicemb.incremental_dump writes the rows that have changed since an earlier checkpoint, without a "
            "tracker; to track the other collections of the model, name this one in fqns_to_skip"
        )


def refuse_delta_tracker(tables: Sequence[str]) -> None:
    """The same, if it is torchrec's delta tracker whose code has asked for an attribute of the collection.

    Some of its modes register no function and go round what they do not know, so this is where all of them come by.
    """
    if sys._getframe(2).f_globals.get("__name__") == _DELTA_TRACKER:
        refuse_tracker(tables)
