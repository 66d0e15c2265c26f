"""Keys are deduplicated when a batch is distributed, which pipelines do ahead, and not when it is looked up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbEvictStrategy
from dynamicemb.shard import ShardedDynamicEmbeddingCollection
from tests.distributed import run_on_ranks
from tests.shard.models import (
    NORMAL,
    collection,
    distribute,
    dynamic,
    evaluated,
    features_of,
    groups,
    one_sample,
    table,
)
from tests.shard.test_steady_state import META, batch_of, ranks, recorded, sharded

LFU = DynamicEmbEvictStrategy.LFU
#: Tables "a" and "c" share a group, "b" and "d" count occurrences in another.
TABLES = {"a": {}, "b": {"evict_strategy": LFU}, "c": {}, "d": {"evict_strategy": LFU}}


# ------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", [{"a": {}, "c": {}}, TABLES], ids=["one group", "two groups"])
def test_sorts_belong_to_the_input(options: dict[str, Any], world_size: int) -> None:
    """The batch's own sort, where it is sent, and the owner's, one for each group of tables, in training."""
    model = sharded([table(name) for name in options], options, world_size)
    batch = batch_of(list(options)).to(META)
    num_groups = len(groups(model))
    for training in (True, False):
        model.train(training)
        for _ in range(2):  # the first batch makes what the next one uses
            context = model.create_context()
            with recorded() as step, ranks(step, 2):
                keys = model.input_dist(context, batch).wait().wait()
            expected = (world_size > 1) + num_groups * training
            assert sum(kernel.startswith("aten.sort") for kernel in step.kernels) == expected
            assert step.kernels.count("triton._number_kernel") == expected
            with recorded() as step, ranks(step, 2):
                model.compute_and_output_dist(context, keys).wait()["a"]
            assert not any(kernel.startswith(("aten.sort", "triton._number_kernel")) for kernel in step.kernels)


# ------------------------------------------------------------------------------------------- modes


def build() -> ShardedDynamicEmbeddingCollection:
    constraints = {
        name: dynamic(max_capacity=512, initializer_args=NORMAL, **options) for name, options in TABLES.items()
    }
    model = distribute(collection(*map(table, TABLES)), constraints, (RowWiseAdagrad, {"lr": 0.5, "eps": 1e-8}))
    return model.module


def batch(rank: int, step: int) -> KeyedJaggedTensor:
    ids = [step + 1, 7, 7, rank]
    return features_of({"a": [ids, []], "b": [[], [(1 << 40) + step, 7]], "c": [ids[::-1], ids], "d": [[], []]})


def flipped(rank: int, world_size: int) -> None:
    """Distributed in one mode and looked up in the other: as if both had happened in the latter."""
    plain, model = build(), build()
    for step, (ahead, then) in enumerate([(False, True), (True, True), (True, False), (False, True), (True, False)]):
        context = model.create_context()
        model.train(ahead)
        keys = model.input_dist(context, batch(rank, step)).wait().wait()
        assert all((group.unique is not None) == ahead for group in keys[-1].groups)
        model.train(then)
        plain.train(then)
        rows = model.compute_and_output_dist(context, keys).wait()
        expected = plain(batch(rank, step)).wait()
        for name in TABLES:
            assert torch.equal(rows[name].values(), expected[name].values()), (step, name)
        if then:
            for output in (rows, expected):
                torch.cat([output[name].values() for name in TABLES]).square().sum().backward()
    every = {name: torch.tensor([0, 1, 2, 3, 4, 5, 7, *range(1 << 40, (1 << 40) + 5)]) for name in TABLES}
    read, wanted = evaluated(model, every), evaluated(plain, every)
    assert all(torch.equal(read[name], wanted[name]) for name in TABLES)
    assert [group.counters() for group in groups(model)] == [group.counters() for group in groups(plain)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mode_changes_in_between(world_size: int) -> None:
    run_on_ranks(world_size, flipped)


# ------------------------------------------------------------------------------------------- growth


def reads_of_steps(rank: int, world_size: int) -> list[int]:
    """How many lists each of some steps makes of tensors, in a group of two tables: a busy one, which is as large as it
    may be, and one that few ids come to. The ids of both together would not fit into the latter."""
    options = {"max_capacity": 4096, "initializer_args": NORMAL, "max_load_factor": 0.5}
    constraints = {"busy": dynamic(**options), "idle": dynamic(init_capacity=256, **options)}
    model = distribute(collection(*map(table, constraints)), constraints, (RowWiseAdagrad, {"lr": 0.5})).module
    reads: list[torch.Tensor] = []
    reads_by_step: list[int] = []
    to_list = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: [reads.append(tensor), to_list(tensor)][1])
        for step in range(4):
            ids = {"busy": torch.arange(300) + step, "idle": torch.arange(5)}
            features = one_sample(ids).sync()
            reads.clear()
            model(features).wait()["idle"].values()
            reads_by_step.append(len(reads))
    return reads_by_step


def test_a_table_is_asked_for_its_size_only_if_its_own_ids_could_fill_it() -> None:
    """On a GPU the host would wait for the answer. With two ranks it does so once, for the sizes of what is sent."""
    assert run_on_ranks(1, reads_of_steps) == [[0] * 4]
    assert run_on_ranks(2, reads_of_steps) == [[1] * 4] * 2
