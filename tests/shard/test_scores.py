"""Each eviction strategy in a case small enough to follow by hand: one bucket, two ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from dynamicemb import ConfigError, DynamicEmbEvictStrategy
from dynamicemb.shard import get_score, set_score, table_statistics
from tests.distributed import run_on_ranks
from tests.oracle import colliding_keys
from tests.shard.models import ZEROS, collection, distribute, dynamic, features_of, local_table, table, train_step

OWNER, WORLD_SIZE, BUCKET = 1, 2, 8
#: All in the one bucket that rank 1 has.
KEYS = colliding_keys(OWNER, WORLD_SIZE, 0.5, None, 20)


def build(strategy: DynamicEmbEvictStrategy) -> nn.Module:
    constraints = {
        "item": dynamic(
            evict_strategy=strategy, max_capacity=BUCKET, bucket_capacity=BUCKET, initializer_args=ZEROS
        )
    }  # fmt: skip
    return distribute(collection(table("item")), constraints, (torch.optim.SGD, {"lr": 1.0}))


def train(model: nn.Module, keys: Sequence[int]) -> None:
    train_step(model, features_of({"item": [keys]}))


def scores(model: nn.Module) -> dict[int, int]:
    """Score by index into KEYS, of the keys that this rank holds."""
    group, index = local_table(model, "item")
    stored = group.stored_rows(index)
    return {KEYS.index(key): score for key, score in zip(stored.keys.tolist(), stored.scores.tolist())}


def lfu(rank: int, world_size: int) -> dict[str, dict[int, int]]:
    model, seen = build(DynamicEmbEvictStrategy.LFU), {}
    # Key 0 comes in every batch, but rarely; key 1 in a single one, five times over both ranks.
    for step in range(4):
        train(model, [KEYS[0]] if rank == 0 else [])
        if step == 2:
            train(model, [KEYS[1]] * (3 if rank == 0 else 2))
    train(model, [key for key in KEYS[2:8] for _ in range(3 + rank)])
    seen["full"] = scores(model)
    train(model, [KEYS[8]] * 9 if rank == 1 else [])
    seen["after one more"] = scores(model)
    return seen


def test_lfu_counts_occurrences_on_all_ranks_not_batches() -> None:
    seen = run_on_ranks(WORLD_SIZE, lfu)[OWNER]
    rest = dict.fromkeys(range(2, 8), 7)
    assert seen["full"] == {0: 4, 1: 5, **rest}
    assert seen["after one more"] == {1: 5, 8: 9, **rest}


def lru(rank: int, world_size: int) -> dict[str, dict[int, int]]:
    model, seen = build(DynamicEmbEvictStrategy.LRU), {}
    train(model, KEYS[:8] if rank == 0 else [])
    train(model, KEYS[1:3])
    train(model, [])
    train(model, [KEYS[0]] * 5 if rank == 1 else [KEYS[4]])
    seen["full"] = scores(model)
    train(model, KEYS[8:13] if rank == 0 else KEYS[3:4])
    seen["after five more"] = scores(model)
    assert get_score(model) == {"item": 5}
    return seen


def test_lru_evicts_the_least_recently_trained() -> None:
    seen = run_on_ranks(WORLD_SIZE, lru)[OWNER]
    assert seen["full"] == {0: 4, 1: 2, 2: 2, 3: 1, 4: 4, 5: 1, 6: 1, 7: 1}
    # Key 3 is as old as keys 5, 6 and 7, but of the batch itself.
    remaining = seen["after five more"]
    assert {key for key in remaining if key < 8} == {0, 3, 4}
    assert remaining == {0: 4, 3: 5, 4: 4, 8: 5, 9: 5, 10: 5, 11: 5, 12: 5}


def refuse_scores(model: nn.Module) -> None:
    """None of them changes anything, also where others in the same call are right."""
    beyond = (2**63, -(2**63) - 1, 2**64, np.uint64(2**63))
    fractions = (0.75, 1.0, float("nan"), float("inf"), np.float32(2.0), torch.tensor(1.5), 1j)
    others = (True, np.True_, torch.tensor(True), "5", b"5", None, [1], (1,), torch.tensor([1]), np.array([1]), set())
    for wrong in (*beyond, *fractions, *others):
        for given in (wrong, {"item": wrong}):
            with pytest.raises(ConfigError, match="table 'item': score"):
                set_score(model, given)
    for names in ({"items": 1}, {"item": 3, "other": 4}, {"item": 3, 7: 4}, {"item": 3, None: 4}):
        with pytest.raises(ConfigError, match="has no customized score; tables that have: item"):
            set_score(model, names)
    with pytest.raises(ConfigError, match=r"'items' \(did you mean 'item'\?\)"):
        set_score(model, {"items": 1})
    assert get_score(model) == {"item": 7}


def customized(rank: int, world_size: int) -> dict[str, dict[int, int]]:
    model, seen = build(DynamicEmbEvictStrategy.CUSTOMIZED), {}
    assert get_score(model) == {"item": 0}
    for key, score in zip(KEYS[:8], [50, -(2**63), 2**63 - 1, 30, -5, 20, 60, 10]):
        set_score(model, score)
        train(model, [key])
    set_score(model, {"item": -(2**62)})
    train(model, [KEYS[6]])
    assert get_score(model) == {"item": -(2**62)}
    seen["full"] = scores(model)
    set_score(model, 7)
    train(model, KEYS[8:11] if rank == 0 else [])
    seen["after three more"] = scores(model)
    refuse_scores(model)
    for right in (np.int32(-4), np.uint64(2**63 - 1), torch.tensor(9, dtype=torch.int8), np.array(5), 7):
        set_score(model, {"item": right})
        assert get_score(model) == {"item": int(right)}
    return seen


def test_customized_evicts_the_least_given_score() -> None:
    seen = run_on_ranks(WORLD_SIZE, customized)[OWNER]
    assert seen["full"] == {0: 50, 1: -(2**63), 2: 2**63 - 1, 3: 30, 4: -5, 5: 20, 6: -(2**62), 7: 10}
    assert seen["after three more"] == {0: 50, 2: 2**63 - 1, 3: 30, 5: 20, 7: 10, 8: 7, 9: 7, 10: 7}


def no_score_to_give(rank: int, world_size: int) -> None:
    model = build(DynamicEmbEvictStrategy.LFU)
    assert get_score(model) == {}
    for given in ({"item": 1}, 5, {}):
        with pytest.raises(ConfigError, match=r"no table with evict_strategy CUSTOMIZED.*item \(LFU\)"):
            set_score(model, given)
    for unsharded in (collection(table("item")), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="the model has no dynamic tables"):
            set_score(unsharded, 5)
        with pytest.raises(ConfigError, match="the model has no dynamic tables"):
            get_score(unsharded)


def test_models_without_such_a_table() -> None:
    run_on_ranks(1, no_score_to_give)


def batch_larger_than_bucket(rank: int, world_size: int, strategy: DynamicEmbEvictStrategy) -> tuple[set[int], int]:
    model = build(strategy)
    train(model, KEYS[:8])
    train(model, KEYS[4:18] if rank == 0 else KEYS[4:6])
    return set(scores(model)), table_statistics(model)["item"].refused


@pytest.mark.parametrize("strategy", list(DynamicEmbEvictStrategy))
def test_keys_of_the_batch_are_safe(strategy: DynamicEmbEvictStrategy) -> None:
    """Four of the eight keys are of the batch and stay; four of its ten others find a place, six do not."""
    (_, _), (stored, refused) = run_on_ranks(WORLD_SIZE, batch_larger_than_bucket, strategy)
    assert stored >= {4, 5, 6, 7}
    assert len(stored) == BUCKET and not stored & {0, 1, 2, 3}
    assert refused == 6
