"""Comparison of everything that two groups of tables hold, wherever each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from dynamicemb.kernels.layout import OptimizerKind, RowLayout
from dynamicemb.table.group import TableGroup
from dynamicemb.table.storage import Chunk
from tests.kernels.memory import GARBAGE_KEY, GARBAGE_SCORE
from tests.tolerances import ENGINE_ROWWISE_ATOL, ENGINE_ROWWISE_RTOL

__all__ = ["assert_close_groups", "assert_equal_groups", "assert_same_bits", "garbage_in_new_chunks"]

#: What is copied to the other device, and compared, at a time.
PIECE_BYTES = 1 << 28
#: A row of all ones, which is NaN in every dtype.
GARBAGE_BYTE = 255
#: A value of 16 bits may round to its neighbour: one step of the dtype.
STEP = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@contextmanager
def garbage_in_new_chunks() -> Iterator[None]:
    """Slots of new chunks begin with the same garbage everywhere, so that all of memory can be compared: a kernel that
    writes where it should not is seen as well as one that does not write where it should."""
    allocate = Chunk.allocate

    def allocate_filled(slots: int, layout: RowLayout, device: torch.device) -> Chunk:
        chunk = allocate(slots, layout, device)
        chunk.keys.fill_(GARBAGE_KEY)
        chunk.scores.fill_(GARBAGE_SCORE)
        chunk.rows.fill_(GARBAGE_BYTE)
        return chunk

    with mock.patch.object(Chunk, "allocate", staticmethod(allocate_filled)):
        yield


def assert_same_bits(expected: torch.Tensor, actual: torch.Tensor, what: str) -> None:
    """``expected`` and ``actual`` [n, ...], on any devices, have the same bits."""
    assert expected.shape == actual.shape and expected.dtype is actual.dtype, what
    for first, wanted, got in _pieces(expected, actual):
        wanted, got = _bits(wanted), _bits(got)
        if not torch.equal(wanted, got):
            differs = (wanted != got).flatten(1).any(1)
            place = int(differs.nonzero()[0])
            raise AssertionError(
                f"{what}: {int(differs.sum())} of {len(differs)} entries differ, the first at {first + place}: "
                f"{got[place].tolist()} instead of {wanted[place].tolist()}"
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Two-dimensional, as whole numbers."""
    tensor = tensor.reshape(tensor.shape[0], -1)
    return tensor.view(torch.int32) if tensor.dtype is torch.float32 else tensor


def _pieces(expected: torch.Tensor, actual: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first entry, expected, actual), both where ``actual`` is."""
    if expected.shape[0] == 0:
        return
    entries = max(1, PIECE_BYTES // max(1, expected.nbytes // expected.shape[0]))
    for first in range(0, expected.shape[0], entries):
        wanted = expected[first : first + entries].to(actual.device)
        yield first, wanted, actual[first : first + entries]


def assert_equal_groups(expected: TableGroup, actual: TableGroup, what: str) -> None:
    """Every byte of digests, keys, scores and rows, empty slots included, the clocks and the counters."""
    _compare_state(expected, actual, what)
    for name, wanted, got in _chunks(expected, actual):
        assert_same_bits(wanted.rows, got.rows, f"{what}: rows of {name}")


def assert_close_groups(expected: TableGroup, actual: TableGroup, what: str) -> None:
    """As :func:`assert_equal_groups`, but rows may differ as those of row-wise Adagrad do between the engines.
    Afterwards ``actual`` has the rows of ``expected``, so that differences do not add up."""
    layout = expected.storage.layout
    assert layout.optimizer is OptimizerKind.ROWWISE_ADAGRAD
    _compare_state(expected, actual, what)
    for name, chunk, other in _chunks(expected, actual):
        for _, wanted, got in _pieces(chunk.rows, other.rows):
            _compare_rows(wanted, got, layout, f"{what}: rows of {name}")
        other.rows.copy_(chunk.rows)


def _compare_rows(expected: torch.Tensor, actual: torch.Tensor, layout: RowLayout, what: str) -> None:
    dtype, begin = layout.embedding_dtype, layout.state_offset_bytes
    used = layout.dim * dtype.itemsize
    wanted, got = (rows.view(dtype)[:, : layout.dim].float() for rows in (expected, actual))
    rtol = ENGINE_ROWWISE_RTOL + STEP[dtype]
    assert torch.allclose(got, wanted, rtol, ENGINE_ROWWISE_ATOL, equal_nan=True), f"{what}: embeddings"
    wanted, got = (rows.view(torch.float32)[:, begin // 4] for rows in (expected, actual))
    assert torch.allclose(got, wanted, ENGINE_ROWWISE_RTOL, 0.0, equal_nan=True), f"{what}: states"
    assert torch.equal(expected[:, used:begin], actual[:, used:begin]), f"{what}: padding"
    assert torch.equal(expected[:, begin + 4 :], actual[:, begin + 4 :]), f"{what}: padding"


def _compare_state(expected: TableGroup, actual: TableGroup, what: str) -> None:
    """All but the rows."""
    assert actual.storage.geometries == expected.storage.geometries, what
    assert actual.counters() == expected.counters(), what
    for name in ("clock", "steps", "custom_scores", "hyperparameters"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name).cpu()), f"{what}: {name}"
    for chunk, wanted, got in _chunks(expected, actual):
        for name in ("digests", "keys", "scores"):
            assert_same_bits(getattr(wanted, name), getattr(got, name), f"{what}: {name} of {chunk}")


def _chunks(expected: TableGroup, actual: TableGroup) -> Iterator[tuple[str, Chunk, Chunk]]:
    pairs = zip(expected.storage.chunks, actual.storage.chunks, strict=True)
    for table, (wanted, got) in enumerate(pairs):
        for number, (first, second) in enumerate(zip(wanted, got, strict=True)):
            yield f"chunk {number} of table {table}", first, second
