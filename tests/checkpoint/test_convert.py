"""convert(): there and back again, bit for bit; what it reports; what it refuses."""

from __future__ import annotations

import builtins
import dataclasses
import os
import tracemalloc
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from dynamicemb.checkpoint.convert import convert, detect
from dynamicemb.checkpoint.files.manifest import MANIFEST, read_manifest
from dynamicemb.checkpoint.files.writer import CheckpointWriter
from dynamicemb.checkpoint.formats import exchange, sorting
from dynamicemb.errors import CheckpointError, ConfigError
from tests.checkpoint.tables import (
    assert_same_rows,
    files_below,
    random_rows,
    record_of,
    states_of,
    stored_arrays,
    write_native,
)

COLLECTION = "model.embedding_module"
DTYPES = ("float32", "float16", "bfloat16")
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")
OTHERS = ("nvidia", "parquet", "safetensors")


def native(
    path: Path, dtype: str = "float32", kind: str = "adam", strategy: str = "lru", rows: int = 300, **fields: Any
) -> dict[str, np.ndarray]:
    """A checkpoint of one table; its arrays."""
    arrays = random_rows(rows, 8, dtype, kind, strategy=strategy)
    record = record_of(8, dtype, kind, strategy, **fields)
    arrays = {part.name: arrays[part.name] for part in record.schema.parts}
    write_native(path, {(COLLECTION, "item"): (record, arrays)})
    return arrays


def there_and_back(path: Path, to: str, world_size: Optional[int] = None) -> None:
    """Converts ``path / "src"`` to ``to`` and back; the rows, and all that the manifest says of them, are the same."""
    convert(path / "src", path / "other", to, world_size)
    assert detect(path / "other") == to
    convert(path / "other", path / "back", "native")
    before, after = files_below(path / "src"), files_below(path / "back")
    del before[MANIFEST], after[MANIFEST]
    assert after == before
    tables, returned = read_manifest(path / "src").tables, read_manifest(path / "back").tables
    for collection, by_name in tables.items():
        for name, record in by_name.items():
            assert returned[collection][name] == dataclasses.replace(record, placement=None)
    assert {file.name for file in path.iterdir()} == {"src", "other", "back"}


@pytest.mark.parametrize("to", OTHERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path: Path, to: str, kind: str, dtype: str) -> None:
    native(tmp_path / "src", dtype, kind)
    there_and_back(tmp_path, to)


@pytest.mark.parametrize("to", OTHERS)
@pytest.mark.parametrize("strategy", ["lfu", "customized"])
def test_round_trip_of_other_scores(tmp_path: Path, to: str, strategy: str) -> None:
    native(tmp_path / "src", strategy=strategy)
    there_and_back(tmp_path, to)


@pytest.mark.parametrize("to", OTHERS)
@pytest.mark.parametrize("rows", [0, 1])
def test_round_trip_of_hardly_any_rows(tmp_path: Path, to: str, rows: int) -> None:
    native(tmp_path / "src", "bfloat16", rows=rows)
    there_and_back(tmp_path, to)


@pytest.mark.parametrize("to", OTHERS)
def test_round_trip_without_saved_state(tmp_path: Path, to: str) -> None:
    native(tmp_path / "src", saved=False)
    there_and_back(tmp_path, to)


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_round_trip_through_ranks(tmp_path: Path, world_size: int) -> None:
    native(tmp_path / "src", "float16")
    there_and_back(tmp_path, "nvidia", world_size)


@pytest.mark.parametrize("to", OTHERS)
def test_round_trip_in_small_pieces(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop over pieces goes round many times, and sorting uses files."""
    modules = ("files.reader", "formats.safetensors", "formats.parquet", "formats.nvidia.reader", "formats.sorting")
    for name in modules:
        monkeypatch.setattr(f"dynamicemb.checkpoint.{name}.PIECE_BYTES", 1000)
    monkeypatch.setattr(sorting.sorted_pieces, "__defaults__", (1000,))
    native(tmp_path / "src")
    there_and_back(tmp_path, to, 3 if to == "nvidia" else None)


@pytest.mark.parametrize("to", OTHERS)
def test_several_tables_and_collections(tmp_path: Path, to: str) -> None:
    tables = {}
    for number, name in enumerate([("model.a", "x"), ("model.a", "x_emb"), ("model.b", "x")]):
        kind = OPTIMIZERS[number]
        tables[name] = (record_of(4 + number, DTYPES[number], kind), random_rows(50, 4 + number, DTYPES[number], kind))
    write_native(tmp_path / "src", tables)
    there_and_back(tmp_path, to)


def test_native_to_native_writes_the_same_files(tmp_path: Path) -> None:
    native(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", "native")
    assert files_below(tmp_path / "dst") == files_below(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "src", "native")  # in its own place
    assert files_below(tmp_path / "dst") == files_below(tmp_path / "src")


@pytest.mark.parametrize("first", OTHERS)
@pytest.mark.parametrize("second", OTHERS)
def test_from_one_foreign_format_to_another(tmp_path: Path, first: str, second: str) -> None:
    arrays = native(tmp_path / "src", "float16")
    convert(tmp_path / "src", tmp_path / "first", first)
    convert(tmp_path / "first", tmp_path / "second", second)
    convert(tmp_path / "second", tmp_path / "back", "native")
    assert_same_rows(stored_arrays(tmp_path / "back", COLLECTION, "item"), arrays)


@pytest.mark.parametrize("to", ["native", *OTHERS])
def test_without_optimizer_state(tmp_path: Path, to: str) -> None:
    arrays = native(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "other", to, optim=False)
    convert(tmp_path / "other", tmp_path / "back", "native")
    assert_same_rows(stored_arrays(tmp_path / "back", COLLECTION, "item"),
                     {name: arrays[name] for name in ("keys", "values", "scores")})  # fmt: skip
    optimizer = read_manifest(tmp_path / "back").tables[COLLECTION]["item"].optimizer
    assert optimizer.kind == "adam" and not optimizer.saved


@pytest.mark.parametrize("to", ["native", *OTHERS])
@pytest.mark.parametrize("origin", ["native", *OTHERS])
def test_progress(tmp_path: Path, to: str, origin: str) -> None:
    native(tmp_path / "native", rows=301)
    if origin != "native":
        convert(tmp_path / "native", tmp_path / origin, origin)
    calls: list[tuple[str, int, int]] = []
    convert(tmp_path / origin, tmp_path / "dst", to, progress=lambda *call: calls.append(call))
    assert {(name, total) for name, _, total in calls} == {(f"{COLLECTION}/item", 301)}
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 301


def test_a_delta_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "src", kind="delta") as checkpoint:
        record = record_of(8, "float32", "sgd", since=3)
        writer = checkpoint.table(COLLECTION, "item", record.schema)
        writer.finish(record)
    with pytest.raises(CheckpointError, match=r"a delta.*merge it first"):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("to", ["native", *OTHERS])
def test_damage_is_found_and_the_destination_stays(tmp_path: Path, to: str) -> None:
    native(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", to)
    before = files_below(tmp_path / "dst")
    path = tmp_path / "src" / COLLECTION / "item_values"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="item_values, offset 0: segment 0 has the CRC-32"):
        convert(tmp_path / "src", tmp_path / "dst", to, overwrite=True)
    assert files_below(tmp_path / "dst") == before
    assert {file.name for file in tmp_path.iterdir()} == {"src", "dst"}


@pytest.mark.parametrize("to", OTHERS)
def test_something_else_is_replaced_only_when_told_to(tmp_path: Path, to: str) -> None:
    native(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"dst: there is something already.*overwrite=True"):
        convert(tmp_path / "src", tmp_path / "dst", to)
    with pytest.raises(CheckpointError, match=r"src: there is something already.*overwrite=True"):
        convert(tmp_path / "src", tmp_path / "src", to)  # in the place of the only copy
    assert detect(tmp_path / "src") == "native"
    assert files_below(tmp_path / "dst") == {"thesis.txt": b"years of work"}
    convert(tmp_path / "src", tmp_path / "dst", to, overwrite=True)
    assert "thesis.txt" not in files_below(tmp_path / "dst")
    assert detect(tmp_path / "dst") == to


def test_a_checkpoint_replaces_only_checkpoints(tmp_path: Path) -> None:
    native(tmp_path / "src")
    native(tmp_path / "dst", "float16")
    convert(tmp_path / "src", tmp_path / "dst", "native")
    assert files_below(tmp_path / "dst") == files_below(tmp_path / "src")
    (tmp_path / "dst" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis.txt.*overwrite=True"):
        convert(tmp_path / "src", tmp_path / "dst", "native")


def test_one_inside_the_other_is_refused(tmp_path: Path) -> None:
    native(tmp_path / "a" / "src")
    for dst in (tmp_path / "a", tmp_path / "a" / "src" / "dst"):
        with pytest.raises(CheckpointError, match="one inside the other"):
            convert(tmp_path / "a" / "src", dst, "native", overwrite=True)
    assert detect(tmp_path / "a" / "src") == "native"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "csv"}, "'csv' is not a format; use one of native, nvidia, parquet, safetensors"),
        ({"to": "nvidia", "world_size": 0}, "world_size=0"),
        ({"to": "native", "world_size": 2}, "goes with nvidia only"),
        ({"to": "native", "dim": 0}, "dim=0"),
        ({"to": "native", "dtype": "int8"}, "dtype='int8'"),
        ({"to": "native", "evict_strategy": "fifo"}, "evict_strategy='fifo'"),
        ({"to": "native", "dtype": "float16"}, "leave them out"),
    ],
)
def test_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    native(tmp_path / "src")
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", **arguments)
    assert not (tmp_path / "dst").exists()


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        detect(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no files of another format"):
        detect(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="not a Parquet or safetensors file"):
        detect(tmp_path / "notes.txt")
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "b.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="it holds parquet and safetensors"):
        detect(tmp_path)


def test_a_dump_that_was_never_finished_is_not_taken_for_another_format(tmp_path: Path) -> None:
    native(tmp_path / "src")
    os.rename(tmp_path / "src", tmp_path / "src.unfinished")
    os.remove(tmp_path / "src.unfinished" / MANIFEST)
    with pytest.raises(CheckpointError, match="never finished"):
        convert(tmp_path / "src.unfinished", tmp_path / "dst", "parquet")
    os.rename(tmp_path / "src.unfinished", tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"item_opt_exp_avg: a file of dynamicemb's own format.*manifest.json"):
        convert(tmp_path / "src", tmp_path / "dst", "parquet")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native(tmp_path / "src")

    def no_space(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)
    monkeypatch.setattr(os, "write", no_space)
    for to in ("native", "nvidia", "safetensors"):
        with pytest.raises(CheckpointError, match="No space left on device; make room"):
            convert(tmp_path / "src", tmp_path / "dst", to)
        assert {file.name for file in tmp_path.iterdir()} == {"src"}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["native", *OTHERS])
def test_memory_is_bounded(tmp_path: Path, to: str) -> None:
    """A table of 79 MB, from and to every format: NumPy's share of memory stays below a few pieces of 16 MiB."""
    rows, dim = 200_000, 32
    keys = np.arange(rows, dtype=np.int64) * 7919
    arrays = {"keys": keys, "values": np.ones((rows, dim), np.float32), "scores": keys % 100}
    arrays |= {f"opt_{name}": np.ones((rows, width), np.float32) for name, width in states_of("adam", dim)}
    write_native(tmp_path / "src", {(COLLECTION, "item"): (record_of(dim, "float32", "adam"), arrays)})
    del arrays
    tracemalloc.start()
    try:
        convert(tmp_path / "src", tmp_path / "other", to)
        convert(tmp_path / "other", tmp_path / "back", "native")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 72 << 20
    assert files_below(tmp_path / "back" / COLLECTION) == files_below(tmp_path / "src" / COLLECTION)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_survives(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16) if dtype == "float16" else bits
    back = exchange.as_dtype(exchange.as_float32(values, dtype), dtype)
    numbers = ~np.isnan(exchange.as_float32(values, dtype))
    assert back.view(np.uint16)[numbers].tolist() == bits[numbers].tolist()
    assert np.isnan(exchange.as_float32(back, dtype))[~numbers].all()


def test_rounding_to_bfloat16_is_torchs() -> None:
    import torch

    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    bits[:4] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFFFFFFFF]  # ties, the largest number, a NaN
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    found = torch.from_numpy(exchange.as_dtype(values, "bfloat16").view(np.int16)).view(torch.bfloat16)
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    numbers = ~torch.isnan(expected)
    assert torch.equal(found[numbers], expected[numbers])


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native(tmp_path / "src")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError("No module named 'pyarrow'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'dynamicemb\[export\]'"):
        convert(tmp_path / "src", tmp_path / "dst", "parquet")
    convert(tmp_path / "src", tmp_path / "dst", "safetensors")


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    native(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "x", "safetensors")
    file = tmp_path / "x" / COLLECTION / "item.safetensors"
    os.rename(tmp_path / "x", tmp_path / COLLECTION)  # the folder around it has the collection's name as well
    path = tmp_path / COLLECTION
    os.link(path / COLLECTION / file.name, path / file.name)
    with pytest.raises(CheckpointError, match="occurs twice; rename the file or the folder"):
        convert(path, tmp_path / "dst", "native")
