"""Readers of Parquet and tab-separated logs: what they return, and what they say about files that are wrong."""

from __future__ import annotations

import re

import criteo_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from criteo_files import COLUMNS, open_files
from rows import CATEGORICAL, DENSE

from dynamicemb import DataError


def _fields(row: int) -> list[str]:
    """A row of text whose numbers follow from its number; c2 and i3 are null in odd rows."""
    dense = ["" if row % 2 and name == "i3" else str(row + place) for place, name in enumerate(DENSE)]
    ids = ["" if row % 2 and name == "c2" else f"{row * 1000 + place:x}" for place, name in enumerate(CATEGORICAL)]
    return [str(row % 2), *dense, *ids]


def _table(rows: range) -> pa.Table:
    columns = {"label": pa.array([float(row % 2) for row in rows], pa.float32())}
    for place, name in enumerate(DENSE):
        columns[name] = pa.array([None if row % 2 and name == "i3" else row + place for row in rows], pa.float32())
    for place, name in enumerate(CATEGORICAL):
        ids = [None if row % 2 and name == "c2" else row * 1000 + place for row in rows]
        columns[name] = pa.array(ids, pa.int64())
    return pa.table(columns)


def _check(rows, numbers: range) -> None:
    number = torch.tensor(list(numbers))
    odd = number % 2 == 1
    assert rows.labels.dtype == rows.dense.dtype == torch.float32
    assert rows.ids.dtype == torch.int64
    assert torch.equal(rows.labels, odd.float())
    dense = number[:, None] + torch.arange(13)
    dense[odd, 2] = 0
    assert torch.equal(rows.dense, dense.float())
    ids = number[:, None] * 1000 + torch.arange(26)
    ids[odd, 1] = 0
    assert torch.equal(rows.ids, ids)
    present = torch.ones_like(ids, dtype=torch.bool)
    present[odd, 1] = False
    assert torch.equal(rows.present, present)


def test_parquet(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(_table(range(10)), path, row_group_size=4)
    source = open_files([path])
    assert source.num_rows == 10
    _check(source.read(0, 10), range(10))
    _check(source.read(3, 9), range(3, 9))
    assert len(source.read(5, 5)) == 0


def test_tsv(tsv_file, monkeypatch):
    monkeypatch.setattr(criteo_files, "TSV_CHUNK_ROWS", 4)
    path = tsv_file([_fields(row) for row in range(10)])
    source = open_files([path])
    assert source.num_rows == 10
    _check(source.read(0, 10), range(10))
    _check(source.read(3, 9), range(3, 9))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("end", ["", "\n"])
def test_tsv_with_and_without_a_last_line_end(tsv_file, monkeypatch, rows, end):
    monkeypatch.setattr(criteo_files, "TSV_CHUNK_ROWS", 4)
    path = tsv_file([_fields(row) for row in range(rows)])
    path.write_text(path.read_text().rstrip("\n") + end)
    source = open_files([path])
    assert source.num_rows == rows
    _check(source.read(0, rows), range(rows))


def test_tsv_with_windows_line_ends(tsv_file):
    path = tsv_file([_fields(row) for row in range(5)])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    _check(open_files([path]).read(0, 5), range(5))


def test_a_folder_is_its_files_by_name_in_either_layout(tmp_path, tsv_file):
    pq.write_table(_table(range(4, 7)), tmp_path / "b.parquet")
    tsv_file([_fields(row) for row in range(4)], name="a.tsv")
    tsv_file([_fields(row) for row in range(7, 9)], name="c.txt")
    (tmp_path / "README.md").write_text("not a log")
    _check(open_files([tmp_path]).read(0, 9), range(9))


def test_files_in_the_order_given(tmp_path):
    for name, rows in (("b", range(2)), ("a", range(2, 5))):
        pq.write_table(_table(rows), tmp_path / f"{name}.parquet")
    _check(open_files([tmp_path / "b.parquet", tmp_path / "a.parquet"]).read(0, 5), range(5))


def test_all_64_bits_of_an_id(tsv_file, tmp_path):
    fields = _fields(0)
    fields[COLUMNS.index("c1")] = "ffffffffffffffff"
    fields[COLUMNS.index("c3")] = "8000000000000000"
    rows = open_files([tsv_file([fields])]).read(0, 1)
    assert rows.ids[0, 0] == -1
    assert rows.ids[0, 2] == -(2**63)
    table = _table(range(1))
    table = table.set_column(table.schema.get_field_index("c1"), "c1", pa.array([2**64 - 1], pa.uint64()))
    pq.write_table(table, tmp_path / "unsigned.parquet")
    assert open_files([tmp_path / "unsigned.parquet"]).read(0, 1).ids[0, 0] == -1


@pytest.mark.parametrize(
    ("column", "field", "message"),
    [
        ("label", "2", "column label holds 2.0; it must be 0 or 1"),
        ("label", "", "column label holds nothing; it must be 0 or 1"),
        ("label", "yes", "column label holds 'yes'; it must be a number"),
        ("i5", "many", "column i5 holds 'many'; it must be a number"),
        ("i5", "nan", "column i5 holds nan; it must be a finite number"),
        ("c7", "xyz", "column c7 holds 'xyz'; it must be a hexadecimal number of at most 16 digits"),
        ("c7", "0x12", "column c7 holds '0x12'; it must be a hexadecimal number of at most 16 digits"),
        ("c7", "1" * 17, f"column c7 holds '{'1' * 17}'; it must be a hexadecimal number of at most 16 digits"),
    ],
)
def test_tsv_field_that_is_wrong(tsv_file, monkeypatch, column, field, message):
    monkeypatch.setattr(criteo_files, "TSV_CHUNK_ROWS", 4)
    rows = [_fields(row) for row in range(10)]
    rows[6][COLUMNS.index(column)] = field
    path = tsv_file(rows)
    source = open_files([path])
    _check(source.read(0, 4), range(4))
    with pytest.raises(DataError, match="^" + re.escape(f"{path}: row 7: {message}") + "$"):
        source.read(4, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: [*fields, "1"], "row 7 has 41 fields; a Criteo row has 40, separated by tabs"),
        (lambda fields: fields[:-1], "row 7 has 39 fields; a Criteo row has 40, separated by tabs"),
        (lambda fields: ["é", *fields[1:]], "row 7 is not plain text"),
    ],
)
def test_tsv_row_that_is_wrong(tsv_file, monkeypatch, change, message):
    monkeypatch.setattr(criteo_files, "TSV_CHUNK_ROWS", 4)
    path = tsv_file([change(_fields(row)) if row == 6 else _fields(row) for row in range(10)])
    with pytest.raises(DataError, match="^" + re.escape(f"{path}: {message}") + "$"):
        open_files([path]).read(0, 10)


def test_parquet_value_that_is_wrong(tmp_path):
    path = tmp_path / "log.parquet"
    for column, value, message in (
        ("label", 0.5, "column label holds 0.5; it must be 0 or 1"),
        ("label", None, "column label holds nothing; it must be 0 or 1"),
        ("i1", float("inf"), "column i1 holds inf; it must be a finite number"),
    ):
        table = _table(range(10))
        values = table[column].to_pylist()
        values[7] = value
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, column, pa.array(values, pa.float32())), path, row_group_size=4)
        with pytest.raises(DataError, match="^" + re.escape(f"{path}: row 8: {message}") + "$"):
            open_files([path]).read(0, 10)


def test_parquet_columns_that_are_wrong(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(_table(range(3)).drop_columns(["i2", "c9"]), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: no column i2, c9")):
        open_files([path])
    table = _table(range(3))
    place = table.schema.get_field_index("c4")
    pq.write_table(table.set_column(place, "c4", pa.array([0.0, 1.0, 2.0])), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: column c4 has type double; it must be an integer")):
        open_files([path])


def test_parquet_file_that_is_damaged(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(_table(range(2000)), path, row_group_size=1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=re.escape(f"{path}: cannot be read: ")):
        open_files([path])
    middle = len(whole) // 2
    path.write_bytes(whole[: middle - 4000] + bytes(8000) + whole[middle + 4000 :])
    with pytest.raises(DataError, match=re.escape(f"{path}: row group ")):
        open_files([path]).read(0, 2000)


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/absent: no such file or folder")):
        open_files([tmp_path / "absent"])
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: no .parquet, .tsv, .txt file in this folder")):
        open_files([tmp_path])
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(DataError, match="no rows"):
        open_files([tmp_path])
