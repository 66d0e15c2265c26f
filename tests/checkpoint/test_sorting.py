"""Rows of any order become sorted pieces, whatever fits in memory, and duplicates are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamicemb.checkpoint.files.schema import Rows, TableSchema
from dynamicemb.checkpoint.formats import sorting
from dynamicemb.checkpoint.formats.sorting import DuplicateKey, sorted_pieces
from dynamicemb.errors import CheckpointError
from tests.checkpoint.tables import random_keys, random_rows
from tests.exploring import examples
from tests.oracle import mix64, unmix64

SCHEMA = TableSchema(2, "float16", (("sum", 1),))
KEYS = st.integers(-(2**63), 2**63 - 1)


def rows_of(keys: np.ndarray) -> Rows:
    """Rows whose other parts follow from the key, so that a mix-up shows."""
    low = keys.view(np.uint64)
    return Rows(
        {
            "keys": keys,
            "values": np.stack([(low % 1000).astype(np.float16), (low % 77).astype(np.float16)], axis=1),
            "scores": keys ^ 0x55,
            "opt_sum": (low % 4093).astype(np.float32)[:, None],
        }
    )


def cut(keys: np.ndarray, size: int) -> Iterator[Rows]:
    for first in range(0, keys.size, size):
        yield rows_of(keys[first : first + size])


def check(keys: np.ndarray, folder: Path, piece_rows: int) -> None:
    pieces = list(sorted_pieces(cut(keys, 7), SCHEMA, keys.size, folder, piece_rows * SCHEMA.row_bytes))
    assert all(0 < len(piece.rows) <= piece_rows for piece in pieces)
    found = np.concatenate([piece.rows.keys for piece in pieces]) if pieces else np.empty(0, np.int64)
    expected = np.array(sorted(keys.tolist(), key=mix64), np.int64)
    assert found.tolist() == expected.tolist()
    for piece in pieces:
        assert piece.mixed.tolist() == [mix64(key) for key in piece.rows.keys.tolist()]
        for name, array in rows_of(piece.rows.keys).arrays.items():
            assert piece.rows.arrays[name].tobytes() == array.tobytes()
            assert piece.rows.arrays[name].flags.c_contiguous
    assert not folder.exists()


@settings(max_examples=examples(40))
@given(keys=st.lists(KEYS, max_size=60, unique=True), piece_rows=st.integers(1, 30))
def test_any_keys(tmp_path_factory: pytest.TempPathFactory, keys: list[int], piece_rows: int) -> None:
    check(np.array(keys, np.int64), tmp_path_factory.mktemp("sort") / "scratch", piece_rows)


@pytest.mark.parametrize("rows", [0, 1, 99, 100, 101, 5000])
def test_sizes_around_a_piece(tmp_path: Path, rows: int) -> None:
    check(random_keys(rows), tmp_path / "scratch", 100)


def test_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "_MAX_BITS", 2)  # 4 files a pass: 3000 rows in pieces of 5 take five passes
    check(random_keys(3000), tmp_path / "scratch", 5)


def test_mixed_keys_that_differ_only_at_the_end(tmp_path: Path) -> None:
    """What nobody meets by chance: all rows in one partition, pass after pass, until the last bits tell them apart."""
    keys = np.array([unmix64((0xABCDEF << 40) + number) for number in range(50)], np.int64)
    check(np.random.default_rng(0).permutation(keys), tmp_path / "scratch", 4)


@pytest.mark.parametrize("piece_rows", [1, 3, 64, 10_000])
@pytest.mark.parametrize("times", [2, 500])
def test_duplicates(tmp_path: Path, piece_rows: int, times: int) -> None:
    keys = random_keys(1000)
    keys[np.random.default_rng(1).permutation(1000)[: times - 1]] = 4242
    keys[0] = 4242
    with pytest.raises(DuplicateKey) as caught:
        list(sorted_pieces(cut(keys, 64), SCHEMA, keys.size, tmp_path / "scratch", piece_rows * SCHEMA.row_bytes))
    assert caught.value.key == 4242
    assert not (tmp_path / "scratch").exists()


def test_temporary_files_go_when_the_caller_stops_early(tmp_path: Path) -> None:
    pieces = sorted_pieces(cut(random_keys(1000), 64), SCHEMA, 1000, tmp_path / "scratch", 10 * SCHEMA.row_bytes)
    next(pieces)
    assert (tmp_path / "scratch").exists()
    pieces.close()  # type: ignore[attr-defined]
    assert not (tmp_path / "scratch").exists()


def test_no_place_for_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"scratch.*make room, or choose another path"):
        list(sorted_pieces(cut(random_keys(100), 7), SCHEMA, 100, tmp_path / "file" / "scratch", SCHEMA.row_bytes))


def test_a_table_that_fits_takes_no_disk(tmp_path: Path) -> None:
    arrays = random_rows(300, 2, "float16", "rowwise_adagrad")
    pieces = list(sorted_pieces([Rows(arrays)], SCHEMA, 300, tmp_path / "missing" / "scratch"))
    assert len(pieces) == 1 and not (tmp_path / "missing").exists()
