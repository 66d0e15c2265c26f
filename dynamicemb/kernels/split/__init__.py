"""The doubling of a table: half of the entries of each bucket move to the new chunk, the rest stay where they are."""

from __future__ import annotations

from dynamicemb.kernels.engine import implementation
from dynamicemb.kernels.views import GroupView

__all__ = ["split"]


def split(view: GroupView, table: int, buckets: int) -> None:
    """Moves the entries of buckets that a doubling has split.

    An entry in slot ``s`` of old bucket ``b`` whose new bucket is ``2b + 1`` moves, with its score and its row, to slot
    ``s`` of that bucket, and its old slot becomes empty.

    Args:
        view: the tables, with the geometry **after** the doubling; the new chunk's digests are all 0.
        table: which table of the group has grown.
        buckets: buckets of the table **before** the doubling. Does not synchronise.
    """
    implementation(__name__, view.device).split(view, table, buckets)
