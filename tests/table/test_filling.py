"""The size that a table begins with when its contents are replaced."""

from __future__ import annotations

from typing import Optional

import pytest
import torch

from dynamicemb.table.filling import HostRows, TableFilling
from tests.oracle import mix64
from tests.table.groups import DIM, config, group_of


@pytest.mark.parametrize(
    ("rows", "saved_slots", "expected"),
    [
        (8, None, 16),  # as large as a new table
        (9, None, 32),  # the smallest of its sizes at which the load is no more than a half
        (17, None, 64),
        (9, 16, 16),  # as it was saved
        (9, 64, 64),
        (9, 24, 32),  # none of its sizes
        (9, 8, 32),  # less than a new table has
        (1000, None, 64),  # all that it may have
    ],
)
def test_the_first_size(rows: int, saved_slots: Optional[int], expected: int) -> None:
    group = group_of(config(capacity=64, init_capacity=16))
    TableFilling(group, 0, rows, saved_slots)
    geometry = group.storage.geometries[0]
    assert (geometry.slots, geometry.levels) == (expected, 0)


def test_a_bucket_that_overflows_makes_the_table_grow() -> None:
    """Until every row has a place; the rows of the buckets before it are not moved wrongly by that."""
    group = group_of(config(capacity=4096, init_capacity=8))
    keys = torch.tensor(sorted(range(300), key=mix64))
    filling = TableFilling(group, 0, rows=2)  # fewer than come
    for piece in keys.split(7):
        filling.add(HostRows(piece, piece, piece.float().unsqueeze(1).expand(-1, DIM).contiguous(), {}))
    filling.finish()
    stored = group.stored_rows(0)
    assert torch.equal(stored.keys, keys)
    assert torch.equal(stored.embeddings[:, 0], keys.float())
    assert (filling.kept, filling.left_out) == (300, 0)
