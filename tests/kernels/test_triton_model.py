"""The Triton engine against the dictionary model, which knows nothing of either engine."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.kernels.keys import key_pool
from tests.kernels.paired import PairedGroup
from tests.kernels.triton_host import DEVICE, MARKS, engine

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _triton_engine() -> Iterator[None]:
    with engine("triton"):
        yield


@pytest.mark.parametrize("policy", ["lru", "lfu", "customized"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (3, 1)])
def test_random_sequences(policy: str, world_size: int, rank: int) -> None:
    """Two tables, one of which grows; training, evaluation and growth, with eviction and refusal on the way."""
    generator = random.Random(world_size)
    group = PairedGroup([(40, 8), (16, 16)], 8, policy, world_size, rank, DEVICE)
    pool = key_pool(generator, 70, rank, world_size, colliding=12)
    for step in range(8):
        keys = generator.choices(pool, k=generator.randrange(1, 60))
        tables = [generator.randrange(2) for _ in keys]
        group.train(keys, tables, scores=[4, -1, 2**63 - 1, -(2**63)])
        if step % 3 == 2:
            group.evaluate(keys[::2] + pool[:5], tables[::2] + [0] * 5)
            group.grow(0)
    assert all(count > 0 for count in group.counts.values()), group.counts
