"""Parquet and safetensors: read by their own libraries, and tables that others wrote with those libraries."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from dynamicemb.checkpoint.convert import convert
from dynamicemb.checkpoint.files.manifest import TableRecord, read_manifest
from dynamicemb.checkpoint.formats import parquet
from dynamicemb.errors import CheckpointError, DynamicEmbWarning
from tests.checkpoint.tables import (
    assert_same_rows,
    random_keys,
    random_rows,
    record_of,
    states_of,
    stored_arrays,
    write_native,
)

COLLECTION = "model.embedding_module"
ROWS, DIM = 150, 6
KEYS = random_keys(ROWS)
VALUES = np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(np.float32)
SCORES = np.random.default_rng(2).integers(0, 1000, ROWS)
DTYPES = ("float32", "float16", "bfloat16")


def native(path: Path, dtype: str, kind: str = "adam") -> dict[str, np.ndarray]:
    arrays = random_rows(ROWS, DIM, dtype, kind)
    write_native(path, {(COLLECTION, "item"): (record_of(DIM, dtype, kind), arrays)})
    return arrays


def converted(path: Path, **keywords: Any) -> tuple[dict[str, np.ndarray], TableRecord]:
    """``path / "src"``, converted without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(path / "src", path / "dst", "native", **keywords)
    return stored_arrays(path / "dst", COLLECTION, "item"), read_manifest(path / "dst").tables[COLLECTION]["item"]


def foreign(path: Path) -> Path:
    """Where a file of somebody else's goes."""
    folder = path / "src" / COLLECTION
    folder.mkdir(parents=True)
    return folder / "item"


def expected(scores: Optional[np.ndarray] = None, dtype: str = "float32") -> dict[str, np.ndarray]:
    scores = np.zeros(ROWS, np.int64) if scores is None else scores
    return {"keys": KEYS, "values": VALUES.astype(dtype), "scores": scores}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam"])
def test_parquet_file(tmp_path: Path, dtype: str, kind: str) -> None:
    arrays = native(tmp_path / "src", dtype, kind)
    convert(tmp_path / "src", tmp_path / "dst", "parquet")
    assert [str(file.relative_to(tmp_path / "dst")) for file in (tmp_path / "dst").rglob("*.*") if file.is_file()] == [
        f"{COLLECTION}/item.parquet"
    ]
    table = pq.read_table(tmp_path / "dst" / COLLECTION / "item.parquet")
    states = [f"opt_{name}" for name, _ in states_of(kind, DIM)]
    assert table.column_names == ["id", "row", "score", *states]
    element = pa.float16() if dtype == "float16" else pa.float32()
    assert table.schema.field("id").type == pa.int64() and table.schema.field("score").type == pa.int64()
    assert pa.types.is_fixed_size_list(table.schema.field("row").type)
    assert table.schema.field("row").type.value_type == element and table.schema.field("row").type.list_size == DIM
    values = arrays["values"]
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    by_key = {key: row for row, key in enumerate(arrays["keys"].tolist())}
    assert len(by_key) == table.num_rows
    for key, row, score, *own_states in zip(*(table[name].to_pylist() for name in table.column_names)):
        assert np.asarray(row, values.dtype).tobytes() == values[by_key[key]].tobytes()
        assert score == arrays["scores"][by_key[key]]
        for name, state in zip(states, own_states):
            assert np.asarray(state, np.float32).tobytes() == arrays[name][by_key[key]].tobytes()


def test_parquet_streams_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamicemb.checkpoint.files.reader.PIECE_BYTES", 2000)
    native(tmp_path / "src", "float32", "sgd")
    convert(tmp_path / "src", tmp_path / "dst", "parquet")
    metadata = pq.ParquetFile(tmp_path / "dst" / COLLECTION / "item.parquet").metadata
    assert metadata.num_row_groups == 3 and metadata.row_group(0).num_rows == 50  # 40 bytes a row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam"])
def test_safetensors_file(tmp_path: Path, dtype: str, kind: str) -> None:
    arrays = native(tmp_path / "src", dtype, kind)
    convert(tmp_path / "src", tmp_path / "dst", "safetensors")
    path = tmp_path / "dst" / COLLECTION / "item.safetensors"
    tensors = load_file(path)
    assert set(tensors) == {"ids", "rows", "scores", *(f"opt_{name}" for name, _ in states_of(kind, DIM))}
    assert tensors["ids"].dtype is torch.int64 and tensors["rows"].dtype is getattr(torch, dtype)
    rows = tensors["rows"].view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else tensors["rows"].numpy()
    found = {"keys": tensors["ids"].numpy(), "values": rows, "scores": tensors["scores"].numpy()}
    found |= {name: tensors[name].numpy() for name in tensors if name.startswith("opt_")}
    assert_same_rows(found, arrays)
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["dynamicemb"])["clock"] == 5000
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0  # tensors are aligned


def test_safetensors_begin_at_multiples_of_their_size(tmp_path: Path) -> None:
    """9 halves take 18 bytes: what follows them would not be aligned, so nothing does."""
    arrays = random_rows(3, 3, "float16", "adam")
    write_native(tmp_path / "src", {(COLLECTION, "item"): (record_of(3, "float16", "adam"), arrays)})
    convert(tmp_path / "src", tmp_path / "dst", "safetensors")
    data = (tmp_path / "dst" / COLLECTION / "item.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, size in (("ids", 8), ("scores", 8), ("opt_exp_avg", 4), ("opt_exp_avg_sq", 4), ("rows", 2)):
        assert (8 + length + header[name]["data_offsets"][0]) % size == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scores", [False, True])
def test_safetensors_from_elsewhere(tmp_path: Path, dtype: str, scores: bool) -> None:
    tensors = {"rows": VALUES.astype(dtype), "ids": KEYS, **({"scores": SCORES} if scores else {})}
    save_file(tensors, foreign(tmp_path).with_suffix(".safetensors"))
    arrays, record = converted(tmp_path)
    assert_same_rows(arrays, expected(SCORES if scores else None, dtype))
    assert record.evict_strategy == "lru" and record.clock == (SCORES.max() if scores else 0)
    assert not record.optimizer.saved and record.schema.dtype == dtype and record.table_rows == ROWS


def test_bfloat16_safetensors_from_elsewhere(tmp_path: Path) -> None:
    rows = torch.from_numpy(VALUES).bfloat16()
    save_torch_file({"rows": rows, "ids": torch.from_numpy(KEYS)}, foreign(tmp_path).with_suffix(".safetensors"))
    arrays, record = converted(tmp_path)
    bits = rows.view(torch.int16).numpy().view(np.uint16)
    assert_same_rows(arrays, {**expected(), "values": bits})
    assert record.schema.dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["fixed", "list", "large", "slices"])
@pytest.mark.parametrize("id_type", [pa.int64(), pa.uint64()])
def test_parquet_from_elsewhere(
    tmp_path: Path, kind: str, id_type: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "PIECE_BYTES", 700)
    flat = pa.array(VALUES.reshape(-1))
    if kind in ("fixed", "slices"):
        rows = pa.FixedSizeListArray.from_arrays(flat, DIM)
    else:
        offsets = pa.array(np.arange(ROWS + 1) * DIM, pa.int64() if kind == "large" else pa.int32())
        rows = (pa.LargeListArray if kind == "large" else pa.ListArray).from_arrays(offsets, flat)
    ids = pa.array(KEYS.view(np.uint64) if id_type == pa.uint64() else KEYS)
    table = pa.table({"score": SCORES, "id": ids, "row": rows})
    group = 7 if kind == "slices" else ROWS
    pq.write_table(table, foreign(tmp_path).with_suffix(".parquet"), row_group_size=group)
    arrays, record = converted(tmp_path, evict_strategy="lfu", dtype="float16")
    assert_same_rows(arrays, expected(SCORES, "float16"))
    assert record.evict_strategy == "lfu"


def test_a_row_group_of_any_size_is_read_in_pieces(tmp_path: Path) -> None:
    """One of 64 MiB: pyarrow's memory, which tracemalloc does not see, stays below that."""
    rows, dim = 1 << 17, 128
    values = np.random.default_rng(0).standard_normal(rows * dim, np.float32)
    table = pa.table({"id": np.arange(rows), "row": pa.FixedSizeListArray.from_arrays(pa.array(values), dim)})
    pq.write_table(table, foreign(tmp_path).with_suffix(".parquet"), row_group_size=rows, use_dictionary=False)
    del table, values
    before, held = pa.default_memory_pool().bytes_allocated(), []

    def progress(*_: object) -> None:
        held.append(pa.default_memory_pool().bytes_allocated() - before)

    convert(tmp_path / "src", tmp_path / "dst", "native", progress=progress)
    assert 0 < max(held) < 56 << 20
    assert stored_arrays(tmp_path / "dst", COLLECTION, "item")["values"].shape == (rows, dim)


def test_one_file(tmp_path: Path) -> None:
    path = foreign(tmp_path).with_suffix(".parquet")
    table = {"id": KEYS, "row": pa.FixedSizeListArray.from_arrays(pa.array(VALUES.reshape(-1)), DIM)}
    pq.write_table(pa.table(table), path)
    convert(path, tmp_path / "dst", "native")
    assert_same_rows(stored_arrays(tmp_path / "dst", COLLECTION, "item"), expected())


@pytest.mark.parametrize("format_name", ["parquet", "safetensors"])
def test_what_has_no_place_is_told(tmp_path: Path, format_name: str) -> None:
    path = foreign(tmp_path).with_suffix(f".{format_name}")
    state = np.ones((ROWS, 1), np.float32)
    if format_name == "parquet":
        rows = pa.FixedSizeListArray.from_arrays(pa.array(VALUES.reshape(-1)), DIM)
        pq.write_table(pa.table({"id": KEYS, "row": rows, "name": ["x"] * ROWS, "opt_sum": state[:, 0]}), path)
    else:
        save_file({"ids": KEYS, "rows": VALUES, "name": state, "opt_sum": state}, path)
    with pytest.warns(DynamicEmbWarning, match=r"item.* name, opt_sum are left out"):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert_same_rows(stored_arrays(tmp_path / "dst", COLLECTION, "item"), expected())


def parquet_columns(**columns: Any) -> dict[str, Any]:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(VALUES.reshape(-1)), DIM)
    return {name: column for name, column in {"id": KEYS, "row": rows, **columns}.items() if column is not None}


def listed(rows: list[Any]) -> pa.Array:
    return pa.array(rows, pa.list_(pa.float32()))


TWICE = KEYS.copy()
TWICE[9] = KEYS[4]
DOUBLES = pa.array(VALUES.reshape(-1).astype(float))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": None}, r"item.parquet: no column 'id' \(there are: row\)"),
        ({"row": None}, r"no column 'row'"),
        ({"id": [str(key) for key in KEYS]}, r"column 'id' is string, not int64"),
        ({"id": pa.array([None, *KEYS[1:].tolist()])}, r"column 'id' has a null"),
        ({"row": SCORES}, r"column 'row' is int64, not a list"),
        ({"row": pa.FixedSizeListArray.from_arrays(DOUBLES, DIM)}, "not a list of float"),
        ({"row": listed([[1, 2]] * (ROWS - 1) + [[1]])}, r"row 149 of column 'row' is not as long as the others"),
        ({"row": listed([[1, 2]] * (ROWS - 1) + [None])}, r"column 'row' has a null"),
        ({"row": listed([[1, 2]] * (ROWS - 1) + [[1, None]])}, r"column 'row' has a null"),
        ({"row": listed([[]] * ROWS)}, r"width of column 'row' cannot be told, or is 0"),
        ({"score": SCORES.astype(float)}, r"column 'score' is double, not int64"),
        ({"id": TWICE}, rf"key {KEYS[4]} occurs more than once, at .*parquet, row 4 and at .*parquet, row 9"),
    ],
)  # fmt: skip
def test_parquet_that_is_no_table(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(parquet_columns(**columns)), foreign(tmp_path).with_suffix(".parquet"))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert not (tmp_path / "dst").exists() and len(list(tmp_path.iterdir())) == 1


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    native(tmp_path / "native", "float32")
    convert(tmp_path / "native", tmp_path / "src", "parquet")
    path = tmp_path / "src" / COLLECTION / "item.parquet"
    data = path.read_bytes()
    for damaged in (b"", data[:-1], data[: len(data) // 2], bytes(len(data))):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"item.parquet: not a Parquet file"):
            convert(tmp_path / "src", tmp_path / "dst", "native")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"rows": VALUES}, r"item.safetensors: no tensor 'ids' \(there are: rows\)"),
        ({"ids": KEYS}, r"no tensor 'rows'"),
        ({"ids": KEYS.astype(np.int32), "rows": VALUES}, r"'ids' of shape \[150\] is not of I64"),
        ({"ids": KEYS, "rows": VALUES.astype(float)}, r"'rows' of shape \[150, 6\] is not of F32 or F16 or BF16"),
        ({"ids": KEYS, "rows": VALUES[:, 0]}, r"'rows' of shape \[150\] is not of .* 2 dimension"),
        ({"ids": KEYS, "rows": VALUES[:, :0]}, r"'rows' has no columns"),
        ({"ids": KEYS, "rows": VALUES[1:]}, r"'rows' has 149 rows, but 'ids' 150"),
        ({"ids": KEYS, "rows": VALUES, "scores": SCORES[1:]}, r"'scores' has 149 rows, but 'ids' 150"),
        ({"ids": TWICE, "rows": VALUES}, rf"key {KEYS[4]} occurs more than once, at .*safetensors, offset \d+ and at"),
    ],
)
def test_safetensors_that_is_no_table(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, foreign(tmp_path).with_suffix(".safetensors"))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert not (tmp_path / "dst").exists() and len(list(tmp_path.iterdir())) == 1


def header_of(**entries: Any) -> bytes:
    tensors = {
        "ids": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        "rows": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
    }
    text = json.dumps({**tensors, **entries}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(32)


IDS = {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"offset 0: 0 bytes are no safetensors file"),
        (b"1234567", r"offset 7: 7 bytes"),
        ((2**63).to_bytes(8, "little"), r"offset 0: a header of 9223372036854775808 bytes"),
        ((9).to_bytes(8, "little") + b"12345678", r"offset 0: a header of 9 bytes"),
        ((1).to_bytes(8, "little") + b"{", r"offset 8: the header is not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xff", r"offset 8: the header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", r"offset 8: the header is not an object"),
        (header_of(__metadata__=[]), "the header is not an object"),
        (header_of(ids=7), "tensor 'ids': not an object"),
        (header_of(ids={**IDS, "shape": [-2]}), r"\[-2\] is no list of sizes"),
        (header_of(ids={**IDS, "shape": [True]}), r"\[True\] is no list of sizes"),
        (header_of(ids={**IDS, "shape": "2"}), "'2' is no list of sizes"),
        (header_of(ids={**IDS, "data_offsets": [0]}), r"data_offsets \[0\] lie outside"),
        (header_of(ids={**IDS, "data_offsets": [16, 0]}), r"data_offsets \[16, 0\] lie outside"),
        (header_of(ids={**IDS, "data_offsets": [0, 33]}), r"data_offsets \[0, 33\] lie outside the 32 bytes"),
        (header_of(ids={**IDS, "shape": [3]}), r"16 bytes are not those of I64 \[3\]"),
        (header_of(ids={**IDS, "shape": [2**62]}), "16 bytes are not those of"),
        (header_of(__metadata__={"dynamicemb": "{"}), r"'dynamicemb', character 1: not JSON"),
        (header_of(__metadata__={"dynamicemb": "[]"}), r"'dynamicemb' is not an object"),
        (header_of(__metadata__={"dynamicemb": "{}"}), r"'dim' is missing"),
    ],
)
def test_safetensors_that_is_damaged(tmp_path: Path, data: bytes, message: str) -> None:
    foreign(tmp_path).with_suffix(".safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert "item.safetensors" in str(caught.value)
    assert not (tmp_path / "dst").exists()


def test_the_header_that_is_damaged_above_is_else_a_table(tmp_path: Path) -> None:
    data = header_of()[:-32] + np.array([5, 6], "<i8").tobytes() + np.arange(4, dtype="<f4").tobytes()
    foreign(tmp_path).with_suffix(".safetensors").write_bytes(data)
    arrays, _ = converted(tmp_path)
    assert_same_rows(arrays, {"keys": np.array([5, 6]), "values": np.arange(4, dtype=np.float32).reshape(2, 2),
                              "scores": np.zeros(2, np.int64)})  # fmt: skip


def test_metadata_that_contradicts_the_file(tmp_path: Path) -> None:
    native(tmp_path / "native", "float32", "adam")
    convert(tmp_path / "native", tmp_path / "src", "safetensors")
    path = tmp_path / "src" / COLLECTION / "item.safetensors"
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    del tensors["opt_exp_avg"]
    save_torch_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"optimizer states .*but its metadata says .*exp_avg"):
        convert(tmp_path / "src", tmp_path / "dst", "native")
