"""Keys without a place: read as zeros, learn nothing, are counted, and are reported as ``safe_check_mode`` says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import CapacityError, DynamicEmbCheckMode, DynamicEmbWarning
from dynamicemb.shard import table_statistics
from tests.distributed import run_on_ranks
from tests.oracle import colliding_keys
from tests.shard.models import (
    NORMAL,
    ZEROS,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    rows,
    table,
    train_step,
)

WORLD_SIZE, OWNER, BUCKET = 3, 1, 8
#: Two more than the bucket of the rank that owns them holds; no other rank refuses anything.
TOO_MANY = colliding_keys(OWNER, WORLD_SIZE, 0.3, None, BUCKET + 2)
FEW = [1, 2, 3]


def build(item: DynamicEmbCheckMode, user: DynamicEmbCheckMode = DynamicEmbCheckMode.IGNORE) -> nn.Module:
    shared: dict[str, Any] = {"max_capacity": 64, "bucket_capacity": BUCKET}
    constraints = {
        "item": dynamic(safe_check_mode=item, initializer_args=NORMAL, **shared),
        "user": dynamic(safe_check_mode=user, initializer_args=ZEROS, **shared),
    }
    return distribute(collection(table("item"), table("user")), constraints, (torch.optim.SGD, {"lr": 1.0}))


def step(model: nn.Module, rank: int, item: list[int], user: list[int]) -> dict[str, torch.Tensor]:
    """The ids come from rank 2 alone."""
    return train_step(model, features_of({"item": [item if rank == 2 else []], "user": [user if rank == 2 else []]}))


def ignore(rank: int, world_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DynamicEmbWarning)
        model = build(DynamicEmbCheckMode.IGNORE)
        output = step(model, rank, TOO_MANY, FEW)["item"]
        twice = step(model, rank, TOO_MANY + TOO_MANY[:1], FEW)["item"]
    after = evaluated(model, {"item": torch.tensor(TOO_MANY), "user": torch.tensor(FEW)})
    assert table_statistics(model)["item"].refused == 4, "each distinct key once in each step"
    assert table_statistics(model)["user"].refused == 0
    # Which keys found a place? Those with a row after all: the refused ones took no update either time.
    stored = after["item"].any(1)
    assert stored.sum() == BUCKET
    assert torch.equal(after["user"], torch.full((3, 8), -2.0 / world_size))
    if rank == 2:
        assert torch.equal(output.any(1), stored)
        assert torch.equal(twice[: len(TOO_MANY)].any(1), stored)
        assert torch.equal(twice[len(TOO_MANY)], twice[0])
        steps = output[stored] - after["item"][stored]
        assert (steps > 0.3).all(), "the others have been trained"


def test_ignore_counts() -> None:
    run_on_ranks(WORLD_SIZE, ignore)


def warn(rank: int, world_size: int) -> list[list[str]]:
    model = build(DynamicEmbCheckMode.WARNING, DynamicEmbCheckMode.WARNING)
    messages = []
    for item, user in ((TOO_MANY, FEW), (FEW, FEW), (TOO_MANY, TOO_MANY)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, rank, item, user)
        messages.append([str(entry.message) for entry in caught if entry.category is DynamicEmbWarning])
    return messages


def test_warning_names_tables_and_counts_on_every_rank() -> None:
    results = run_on_ranks(WORLD_SIZE, warn)
    assert results == results[:1] * WORLD_SIZE
    first, second, third = results[0]
    assert len(first) == 1 and "table 'item' refused 2 keys" in first[0] and "user" not in first[0]
    assert second == []
    assert "table 'item' refused" in third[0] and "table 'user' refused 2 keys" in third[0]


def error(rank: int, world_size: int) -> str:
    model = build(DynamicEmbCheckMode.ERROR)
    step(model, rank, FEW, FEW)
    with pytest.raises(CapacityError) as caught:
        step(model, rank, TOO_MANY, FEW)
    # No rank waits for another one: the next steps work.
    step(model, rank, [], [])
    # The other table may refuse what it likes, even as it does not raise.
    step(model, rank, FEW, TOO_MANY)
    assert table_statistics(model)["user"].refused > 0
    model.eval()
    rows(model, features_of({"item": [TOO_MANY], "user": [TOO_MANY]}))
    return str(caught.value)


def test_error_is_raised_on_every_rank() -> None:
    messages = run_on_ranks(WORLD_SIZE, error)
    assert messages == messages[:1] * WORLD_SIZE
    assert "table 'item' refused 2 keys" in messages[0] and "raise the capacity" in messages[0]


def error_and_warning(rank: int, world_size: int) -> tuple[str, list[str]]:
    model = build(DynamicEmbCheckMode.ERROR, DynamicEmbCheckMode.WARNING)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CapacityError) as raised:
            step(model, rank, TOO_MANY, TOO_MANY)
    return str(raised.value), [str(entry.message) for entry in caught if entry.category is DynamicEmbWarning]


def test_each_table_has_its_own_mode() -> None:
    for raised, warned in run_on_ranks(WORLD_SIZE, error_and_warning):
        assert "'item'" in raised and "'user'" not in raised
        assert len(warned) == 1 and "'user'" in warned[0] and "'item'" not in warned[0]
