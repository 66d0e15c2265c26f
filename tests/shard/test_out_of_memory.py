"""A rank without room for its part of the tables: all ranks learn of it, when they are made and loaded."""

from __future__ import annotations

import pytest
from torchrec.modules.embedding_modules import EmbeddingCollection

from dynamicemb.errors import OutOfMemoryError, RemoteRankError
from tests.distributed import run_on_ranks
from tests.shard.models import collection, distribute, dynamic, evaluated, features_of, table, train_step
from tests.table.test_out_of_memory import room_for


def make() -> EmbeddingCollection:
    return distribute(collection(table("item"), table("user")), {"item": dynamic(), "user": dynamic()})


def work(rank: int, world_size: int) -> None:
    slots = 200 if rank == 1 else 10**9
    expected = OutOfMemoryError if rank == 1 else RemoteRankError
    with room_for(slots), pytest.raises(expected, match="table 'item': memory for 512 rows") as caught:
        make()
    if rank == 0:
        assert "rank 1 of the process group cannot make its tables" in str(caught.value)
    model = make()  # the ranks are in step
    train_step(model, features_of({"item": [[1, 2]], "user": [[3]]}))
    state = dict(model.state_dict())
    with room_for(slots), pytest.raises(expected, match=r"'item': memory for 512 rows.* the table is empty now"):
        model.load_state_dict(state)
    model.load_state_dict(state)
    ids = features_of({"item": [[1, 2]], "user": [[3]]}).to_dict()
    rows = evaluated(model, {name: jagged.values() for name, jagged in ids.items()})
    assert all(values.abs().sum() > 0 for values in rows.values())


def test_all_ranks_learn_of_it() -> None:
    run_on_ranks(2, work)
