"""What a CUDA graph cannot hold, with the question whether one is being captured answered by hand."""

from __future__ import annotations

import pytest
import torch

from dynamicemb.errors import ConfigError
from dynamicemb.table import group as group_module
from dynamicemb.table.capture import is_captured
from tests.table.groups import CPU, config, group_of, read, train


def captured(patch: pytest.MonkeyPatch, answer: bool = True) -> None:
    patch.setattr(group_module, "is_captured", lambda device: answer)


def test_a_table_that_can_still_grow_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(config(capacity=64), config("tag", capacity=64, init_capacity=16))
    train(group, [1, 2, 3], table=1).sum().backward()
    before = group.progress(1), group.counters(), read(group, [1, 2, 3, 4], table=1)
    captured(monkeypatch)
    for table in (0, 1):  # they share the lookup
        with pytest.raises(ConfigError) as error:
            train(group, [4, 5], table)
        assert "'tag' has 16 slots on this rank, of at most 64" in str(error.value)
        assert "init_capacity=max_capacity" in str(error.value)
    assert (group.progress(1), group.counters(), read(group, [1, 2, 3, 4], table=1)) == before


def test_a_table_that_has_all_its_slots_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(config(capacity=32, init_capacity=16))
    for key in range(32):
        train(group, [key])
    assert not group.storage.growable
    captured(monkeypatch)
    train(group, [77])


def test_the_cpu_captures_nothing() -> None:
    assert not is_captured(CPU) and not is_captured(torch.device("meta"))
