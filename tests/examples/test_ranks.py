"""One error is reported once, whichever ranks have it."""

from __future__ import annotations

import datetime

import pytest
import ranks
import torch.distributed as dist
from ranks import Ranks

from dynamicemb import DataError


@pytest.fixture
def two_ranks(monkeypatch) -> list[Ranks]:
    monkeypatch.setattr(ranks, "REPORT_TIMEOUT", datetime.timedelta(milliseconds=200))
    store = dist.HashStore()
    return [Ranks(rank, 2, rank, 2, store) for rank in range(2)]


def test_an_error_of_all_ranks_is_reported_by_the_first(two_ranks, capfd):
    two_ranks[0].report(DataError("row 3"))
    two_ranks[1].report(DataError("row 3"))
    assert capfd.readouterr().err == "error: row 3\n"


def test_an_error_of_one_rank_is_reported_by_that_rank(two_ranks, capfd):
    two_ranks[1].report(DataError("row 3"))
    assert capfd.readouterr().err == "error: row 3\n"


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    alone = Ranks.from_environment()
    assert (alone.rank, alone.world_size, alone.is_first) == (0, 1, True)
