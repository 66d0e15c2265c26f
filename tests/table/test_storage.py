"""Memory of a group: what is allocated, how it is aligned, and what a walk over it returns."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.options import EMBEDDING_DTYPES
from dynamicemb.table.optimizers import OptimizerConfig
from tests import tolerances
from tests.oracle import TableModel, mix64
from tests.table.groups import NORMAL, config, group_of, keys_and_tables, read, train


@pytest.mark.parametrize("dtype", EMBEDDING_DTYPES)
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_stored_rows_are_what_was_trained(kind: OptimizerKind, dtype: torch.dtype) -> None:
    optimizer = OptimizerConfig(kind=kind, learning_rate=0.5, beta1=0.5, beta2=0.75)
    group = group_of(
        config("other", dim=12, embedding_dtype=dtype, optimizer=optimizer),
        config("item", dim=12, embedding_dtype=dtype, optimizer=optimizer, initializer=NORMAL, capacity=256),
    )
    keys = [*range(-30, 30), 2**63 - 1, -(2**63)]
    rows, lookup = group.train_lookup(*keys_and_tables(keys, 1))
    gradients = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    group.apply_gradients(lookup, gradients)
    stored = group.stored_rows(1)
    assert stored.keys.tolist() == sorted(keys, key=mix64), "ascending in the mixed key, unsigned"
    assert stored.embeddings.dtype is dtype and stored.embeddings.shape == (len(keys), 12)
    order = [keys.index(key) for key in stored.keys.tolist()]
    assert torch.equal(stored.embeddings.float(), group.eval_lookup(*keys_and_tables(keys, 1))[order])
    assert (stored.embeddings.float() != rows[order]).any(1).all()
    squares = gradients[order] ** 2
    expected = {
        OptimizerKind.SGD: {},
        OptimizerKind.ADAGRAD: {"sum": squares},
        OptimizerKind.ROWWISE_ADAGRAD: {"sum": squares.mean(1, keepdim=True)},
        OptimizerKind.ADAM: {"exp_avg": gradients[order] * 0.5, "exp_avg_sq": squares * 0.25},
    }[kind]
    assert stored.states.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(stored.states[name].numpy(), values.numpy(), rtol=tolerances.ROWWISE_STATE_RTOL)
    assert stored.scores.tolist() == [1] * len(keys)
    assert group.stored_rows(0).keys.numel() == 0


def test_stored_rows_are_a_copy() -> None:
    group = group_of()
    train(group, [1, 2])
    stored = group.stored_rows(0)
    train(group, [1, 3]).sum().backward()
    assert stored.keys.numel() == 2 and not stored.embeddings.any()


def test_slots_are_those_of_the_layout_after_growth() -> None:
    group = group_of(config("a", capacity=8), config("b", capacity=4000, init_capacity=8, max_load_factor=1.0))
    model = TableModel(4000, 8, 8, index=1)
    for first in range(0, 60, 3):
        train(group, range(first, first + 3), 1).sum().backward()
        while model.capacity < group.storage.geometries[1].slots:
            model.grow()
        model.insert(sorted(range(first, first + 3), key=mix64), [first // 3 + 1] * 3)
        stored = group.stored_rows(1)
        assert dict(zip(stored.keys.tolist(), stored.slots.tolist())) == {
            key: model.slot(key) for key in model.place_of
        }
    assert len(group.storage.chunks[1]) > 3, "the table has grown several times"
    assert read(group, list(model.place_of), 1) == [-1.0] * len(model.place_of)


def test_rows_are_aligned_for_wide_access() -> None:
    group = group_of(config(capacity=1024, init_capacity=8, dim=20, embedding_dtype=torch.float16))
    train(group, range(300))
    for chunk in group.storage.chunks[0]:
        assert all(address % 16 == 0 for address in chunk.addresses())
        assert chunk.rows.shape[1] % 16 == 0


def test_metadata_takes_17_bytes_a_slot() -> None:
    group = group_of(config(capacity=1024, dim=16), config("other", capacity=100, dim=16))
    slots = 1024 + 104
    assert group.storage.num_bytes == slots * (1 + 8 + 8 + 16 * 4)
    allocated = sum(
        array.untyped_storage().nbytes()
        for chunks in group.storage.chunks
        for chunk in chunks
        for array in (chunk.digests, chunk.keys, chunk.scores, chunk.rows)
    )
    assert allocated == group.storage.num_bytes


def test_tables_that_can_grow_are_known() -> None:
    """Those alone are looked at before a lookup; a table that has been emptied is one of them again."""
    sizes = ((64, 8), (8, 8), (16, 8))
    group = group_of(
        *(config(f"t{table}", capacity=most, init_capacity=first) for table, (most, first) in enumerate(sizes))
    )
    storage = group.storage
    assert storage.growable == [0, 2]
    storage.double(2)
    assert storage.growable == [0]
    for _ in range(3):
        storage.double(0)
    assert storage.growable == []
    group.reset(2)
    assert storage.growable == [2] and copy.deepcopy(storage).growable == [2]


def test_a_pickled_group_leads_to_its_own_memory() -> None:
    """A copy of the addresses would lead to the rows of the original, or of nobody."""
    group = group_of(config(capacity=64, init_capacity=8, max_load_factor=1.0))
    train(group, range(14))
    storage = group.storage
    copied = pickle.loads(pickle.dumps(storage))
    addresses = [chunk.addresses() for chunk in copied.chunks[0]]
    assert len(addresses) == 2 and copied.view.addresses[:, :2].t().tolist() == addresses
    assert addresses != [chunk.addresses() for chunk in storage.chunks[0]]
