"""NVIDIA dumps, made by NumPy from the description of their files, become checkpoints of ours, and the other way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from dynamicemb.checkpoint.convert import convert, detect
from dynamicemb.checkpoint.files.manifest import TableRecord, read_manifest
from dynamicemb.errors import CheckpointError, DynamicEmbWarning
from tests.checkpoint.tables import (
    CLOCK,
    HYPERPARAMETERS,
    assert_same_rows,
    files_below,
    random_keys,
    random_rows,
    record_of,
    states_of,
    stored_arrays,
    write_native,
    write_nvidia,
)

COLLECTION = "model.embedding_module"
ROWS, DIM = 200, 8
OPT_ARGS: dict[str, dict[str, Any]] = {
    "sgd": {"opt_type": "sgd", "lr": 0.5},
    "adagrad": {"opt_type": "exact_adagrad", "lr": 0.5, "eps": 1e-6, "initial_accumulator_value": 0.1},
    "rowwise_adagrad": {"opt_type": "exact_row_wise_adagrad", "lr": 0.5, "eps": 1e-6, "initial_accumulator_value": 0.1},
    "adam": {"opt_type": "adam", "lr": 0.5, "iters": 77, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.0},
}
WIDTH = {"sgd": 0, "adagrad": DIM, "rowwise_adagrad": 1, "adam": 2 * DIM}
KEYS = random_keys(ROWS)
VALUES = np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(np.float32)


def states(kind: str, width: Optional[int] = None) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((ROWS, width or WIDTH[kind])).astype(np.float32)


def split(kind: str, state: np.ndarray) -> dict[str, np.ndarray]:
    """State columns by part of ours, from the description."""
    if kind == "adam":
        return {"opt_exp_avg": state[:, :DIM], "opt_exp_avg_sq": state[:, DIM:]}
    return {} if kind == "sgd" else {"opt_sum": state[:, : (DIM if kind == "adagrad" else 1)]}


def write_older(
    folder: Path, values: np.ndarray, scores: Optional[np.ndarray] = None, opt_args: Optional[dict[str, Any]] = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    KEYS.astype("<i8").tofile(folder / "item_keys")
    values.astype("<f4").tofile(folder / "item_values")
    if scores is not None:
        scores.astype("<u8").tofile(folder / "item_scores")
    if opt_args is not None:
        (folder / "item_opt_args.json").write_text(json.dumps(opt_args))


def converted(path: Path, **keywords: Any) -> tuple[dict[str, np.ndarray], TableRecord]:
    """The table, converted without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(path / "src", path / "dst", "native", **keywords)
    return stored_arrays(path / "dst", COLLECTION, "item"), read_manifest(path / "dst").tables[COLLECTION]["item"]


def expected(scores: np.ndarray, **state: np.ndarray) -> dict[str, np.ndarray]:
    return {"keys": KEYS, "values": VALUES, "scores": scores.astype(np.int64), **state}


@pytest.mark.parametrize("kind", list(OPT_ARGS))
def test_older_layout_with_state(tmp_path: Path, kind: str) -> None:
    state = states(kind)[:, : WIDTH[kind]]
    write_older(tmp_path / "src" / COLLECTION, np.concatenate([VALUES, state], axis=1), None, OPT_ARGS[kind])
    arrays, record = converted(tmp_path)
    assert_same_rows(arrays, expected(np.zeros(ROWS), **split(kind, state)))
    assert record.evict_strategy == "lru" and record.optimizer.kind == kind and record.optimizer.saved
    assert record.optimizer.steps == (77 if kind == "adam" else 0)
    numbers = record.optimizer.hyperparameters
    assert numbers["learning_rate"] == 0.5
    assert numbers.get("eps") == (None if kind == "sgd" else 1e-6)
    if kind == "adam":
        assert (numbers["beta1"], numbers["beta2"], numbers["weight_decay"]) == (0.8, 0.9, 0.0)
    if "adagrad" in kind:
        assert numbers["initial_accumulator_value"] == 0.1
    assert record.table_rows == ROWS and record.placement is None


def test_older_layout_with_rows_alone(tmp_path: Path) -> None:
    write_older(tmp_path / "src" / COLLECTION, VALUES)
    arrays, record = converted(tmp_path)
    assert_same_rows(arrays, expected(np.zeros(ROWS)))
    assert not record.optimizer.saved and record.evict_strategy == "lru"


def test_older_layout_with_scores(tmp_path: Path) -> None:
    scores = np.random.default_rng(3).integers(0, 2**62, ROWS)
    write_older(tmp_path / "src" / COLLECTION, VALUES, scores)
    arrays, record = converted(tmp_path, evict_strategy="lfu")
    assert_same_rows(arrays, expected(scores))
    assert record.evict_strategy == "lfu"
    with pytest.warns(DynamicEmbWarning, match=r"nothing says what the scores of table 'item' mean.*evict_strategy"):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert_same_rows(stored_arrays(tmp_path / "dst", COLLECTION, "item"), expected(scores))


def test_older_scores_beyond_63_bits(tmp_path: Path) -> None:
    write_older(tmp_path / "src" / COLLECTION, VALUES, np.full(ROWS, 2**63, np.uint64))
    with pytest.raises(CheckpointError, match=r"item_scores: the score 9223372036854775808 is above"):
        convert(tmp_path / "src", tmp_path / "dst", "native", evict_strategy="lfu")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(("padding", "hint"), [(1, None), (4, DIM), (8, DIM)])
def test_older_rowwise_state_with_padding(tmp_path: Path, padding: int, hint: Optional[int]) -> None:
    state = states("rowwise_adagrad", padding)
    values = np.concatenate([VALUES, state], axis=1)
    write_older(tmp_path / "src" / COLLECTION, values, None, OPT_ARGS["rowwise_adagrad"])
    if hint is not None:
        with pytest.raises(
            CheckpointError, match=rf"rows of {DIM + padding} values can be read in several ways.*give dim"
        ):
            convert(tmp_path / "src", tmp_path / "dst", "native")
    arrays, _ = converted(tmp_path, dim=hint)
    assert_same_rows(arrays, expected(np.zeros(ROWS), opt_sum=state[:, :1]))


@pytest.mark.parametrize("kind", list(OPT_ARGS))
@pytest.mark.parametrize("hint", [None, DIM])
def test_older_dump_that_names_no_optimizer(tmp_path: Path, kind: str, hint: Optional[int]) -> None:
    """The first versions wrote the numbers of the optimizer alone; widths tell the two Adagrads apart, or dim does."""
    opt_args = {name: number for name, number in OPT_ARGS[kind].items() if name != "opt_type"}
    values = np.concatenate([VALUES, states(kind)[:, : WIDTH[kind]]], axis=1)
    write_older(tmp_path / "src" / COLLECTION, values, None, opt_args)
    if kind == "adagrad":  # 8 + 8: the state may be one number with padding for halves
        with pytest.raises(CheckpointError, match=r"opt_args.json: does not name the optimizer.*which Adagrad"):
            convert(tmp_path / "src", tmp_path / "dst", "native", dim=hint)
        return
    arrays, record = converted(tmp_path, dim=hint)
    assert_same_rows(arrays, expected(np.zeros(ROWS), **split(kind, states(kind)[:, : WIDTH[kind]])))
    assert record.optimizer.kind == kind and record.optimizer.saved


def test_wider_rows_tell_adagrad_by_their_dim(tmp_path: Path) -> None:
    """dim 8 with 8 columns of state could be padded row-wise state; with dim 16 there is one reading."""
    opt_args = {"lr": 0.5, "eps": 1e-6, "initial_accumulator_value": 0.1}
    write_older(tmp_path / "src" / COLLECTION, np.concatenate([VALUES] * 4, axis=1), None, opt_args)
    arrays, record = converted(tmp_path, dim=2 * DIM)
    assert record.optimizer.kind == "adagrad" and arrays["opt_sum"].shape == (ROWS, 2 * DIM)


def test_older_dump_without_its_state(tmp_path: Path) -> None:
    """The optimizer is named, but rows are DIM wide: 8 is not 3 times anything."""
    write_older(tmp_path / "src" / COLLECTION, VALUES, None, OPT_ARGS["adam"])
    with pytest.raises(CheckpointError, match=r"item_values: rows of 8 values.*3 times.*give dim=8"):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    arrays, record = converted(tmp_path, dim=DIM)
    assert_same_rows(arrays, expected(np.zeros(ROWS)))
    assert record.optimizer.kind == "adam" and not record.optimizer.saved


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("kind", list(OPT_ARGS))
@pytest.mark.parametrize("states_item", ["emb_opt_values", "opt_values"])
def test_newer_layout(tmp_path: Path, kind: str, world_size: int, states_item: str) -> None:
    state = states(kind)[:, : WIDTH[kind]]
    scores = np.random.default_rng(3).integers(-(2**40), 2**62, ROWS)
    folder = tmp_path / "src" / COLLECTION
    write_nvidia(folder, "item", KEYS, VALUES, world_size, scores, state if WIDTH[kind] else None, states_item)
    opt_args = {
        **OPT_ARGS[kind],
        "evict_strategy": "EvictStrategy.KCustomized",
        "step_score": 55,
        "dist_type": "roundrobin",
    }
    (folder / "item_opt_args.json").write_text(json.dumps(opt_args))
    arrays, record = converted(tmp_path)
    assert_same_rows(arrays, expected(scores, **split(kind, state)))
    assert record.evict_strategy == "customized" and record.custom_score == 55
    assert record.optimizer.kind == kind and record.optimizer.saved


@pytest.mark.parametrize("width", [1, 4, 8])
def test_newer_rowwise_state_with_padding(tmp_path: Path, width: int) -> None:
    state = states("rowwise_adagrad", width)
    folder = tmp_path / "src" / COLLECTION
    write_nvidia(folder, "item", KEYS, VALUES, 2, np.arange(ROWS), state)
    opt_args = {**OPT_ARGS["rowwise_adagrad"], "evict_strategy": "EvictStrategy.KLfu"}
    (folder / "item_opt_args.json").write_text(json.dumps(opt_args))
    arrays, record = converted(tmp_path)
    assert_same_rows(arrays, expected(np.arange(ROWS), opt_sum=state[:, :1]))
    assert record.evict_strategy == "lfu"


def test_ages_become_scores(tmp_path: Path) -> None:
    ages = np.random.default_rng(3).integers(1000, 2**60, ROWS)
    folder = tmp_path / "src" / COLLECTION
    write_nvidia(folder, "item", KEYS, VALUES, 3, ages)
    (folder / "item_opt_args.json").write_text(json.dumps({**OPT_ARGS["sgd"], "evict_strategy": "EvictStrategy.KLru"}))
    arrays, record = converted(tmp_path)
    assert_same_rows(arrays, expected(ages.max() - ages))
    assert record.evict_strategy == "lru" and arrays["scores"].min() == 0
    assert record.clock == arrays["scores"].max()  # what is trained next is more recent than all of them


def test_halves_on_request(tmp_path: Path) -> None:
    write_older(tmp_path / "src" / COLLECTION, VALUES)
    arrays, record = converted(tmp_path, dtype="float16")
    assert_same_rows(arrays, {**expected(np.zeros(ROWS)), "values": VALUES.astype(np.float16)})
    assert record.schema.dtype == "float16"


@pytest.mark.parametrize("inside", [False, True])
def test_the_folder_of_one_collection(tmp_path: Path, inside: bool) -> None:
    write_older(tmp_path / "src" / COLLECTION, VALUES)
    convert(tmp_path / "src" / COLLECTION if inside else tmp_path / "src", tmp_path / "dst", "native")
    assert list(read_manifest(tmp_path / "dst").tables) == [COLLECTION]


def test_what_has_no_place_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "src" / COLLECTION
    write_nvidia(folder, "item", KEYS, VALUES, 1)
    for item in ("counter_keys", "counter_frequencies"):
        KEYS.tofile(folder / f"item_{item}.rank_0.world_size_1")
    (folder / "README").write_text("")
    with pytest.warns(DynamicEmbWarning) as caught:
        convert(tmp_path / "src", tmp_path / "dst", "native")
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "README belong to no table and are left out" in messages[0]
    assert "item_counter_keys.*, item_counter_frequencies.* are left out" in messages[1]
    assert_same_rows(stored_arrays(tmp_path / "dst", COLLECTION, "item"), expected(np.zeros(ROWS)))


def test_empty_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "src" / COLLECTION
    write_nvidia(folder, "item", KEYS[:3], VALUES[:3], 8)
    arrays, _ = converted(tmp_path)
    assert_same_rows(arrays, {"keys": KEYS[:3], "values": VALUES[:3], "scores": np.zeros(3, np.int64)})


def test_an_empty_table_needs_its_dim(tmp_path: Path) -> None:
    write_nvidia(tmp_path / "src" / COLLECTION, "item", KEYS[:0], VALUES[:0], 2)
    with pytest.raises(CheckpointError, match=r"emb_values.rank_0.*no rows, so their width cannot be told; give dim"):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    arrays, record = converted(tmp_path, dim=12)
    assert arrays["values"].shape == (0, 12) and record.rows == 0


def newer(folder: Path) -> None:
    write_nvidia(folder, "item", KEYS, VALUES, 2, np.arange(ROWS), states("adam"))
    (folder / "item_opt_args.json").write_text(json.dumps({**OPT_ARGS["adam"], "evict_strategy": "EvictStrategy.KLfu"}))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def duplicate(folder: Path) -> None:
    """The first key of rank 0 is also the third of rank 1."""
    path = folder / "item_emb_keys.rank_1.world_size_2"
    keys = np.fromfile(path, "<i8")
    keys[2] = KEYS[0]
    keys.tofile(path)


def part(folder: Path, item: str, rank: int) -> Path:
    return folder / f"item_emb_{item}.rank_{rank}.world_size_2"


ARGS = "item_opt_args.json"
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: part(f, "keys", 1).unlink(), r"emb_keys.rank_1.world_size_2: no such file, but 1 of 2"),
    (lambda f: part(f, "values", 0).unlink(), r"emb_values.rank_0.world_size_2: no such file"),
    (lambda f: part(f, "scores", 1).unlink(), r"emb_scores.rank_1.world_size_2: no such file"),
    (lambda f: part(f, "opt_values", 1).unlink(), r"opt_values.rank_1.world_size_2: no such file"),
    (lambda f: part(f, "keys", 1).rename(part(f, "keys", 2)),
     "rank is not below its world size"),
    (lambda f: (f / "item_emb_keys.rank_0.world_size_3").touch(), "from 2 and from 3 ranks; leave only the"),
    (lambda f: KEYS.tofile(f / "item_emb_keys.rank_0.world_size_999999999999"), "files of dumps from 2 and from 9999"),
    (lambda f: truncate(part(f, "keys", 0), 796), r"keys.rank_0.*, offset 792: 796 bytes"),
    (lambda f: truncate(part(f, "keys", 0), 792), r"scores.rank_0.*, offset 792: 800 bytes.* 99 keys"),
    (lambda f: truncate(part(f, "scores", 1), 792), r"scores.rank_1.*, offset 792: 792 bytes.*100 keys"),
    (lambda f: truncate(part(f, "values", 1), 3196), r"values.rank_1.*: 3196 bytes are no whole number"),
    (lambda f: truncate(part(f, "values", 1), 2800), r"rank_1.*: 7 values for each row, but .*rank_0.* 8"),
    (lambda f: truncate(part(f, "values", 1), 0), r"values.rank_1.*: 0 bytes are no whole number"),
    (lambda f: [truncate(part(f, "opt_values", rank), 100 * 15 * 4) for rank in range(2)],
     "15 values for each row, which adam does not have with rows of 8"),
    (duplicate, r"item: key 0 occurs more than once, at .*rank_0.*, offset 0 and at .*rank_1.*, offset 16"),
    (lambda f: (f / ARGS).unlink(), r"item_opt_args.json: does not name the optimizer"),
    (lambda f: edit(f / ARGS, opt_type="lamb"), r"opt_args.json: opt_type is 'lamb'; known are sgd"),
    (lambda f: edit(f / ARGS, opt_type="exact_adagrad"), "16 values for each row, which adagrad does not"),
    (lambda f: edit(f / ARGS, evict_strategy="EvictStrategy.KEpochLru"), "'EvictStrategy.KEpochLru', whose"),
    (lambda f: edit(f / ARGS, lr="fast"), "lr is 'fast', not a finite number"),
    (lambda f: edit(f / ARGS, iters=-1), "iters is -1, not an integer from 0"),
    (lambda f: edit(f / ARGS, step_score=2**63), "step_score is 9223372036854775808"),
    (lambda f: (f / ARGS).write_text("{"), r"opt_args.json, offset 1: not JSON"),
    (lambda f: (f / ARGS).write_bytes(b"\xff"), r"opt_args.json, offset 0: not UTF-8"),
    (lambda f: (f / ARGS).write_text("[]"), "not a JSON object"),
    (lambda f: edit(f / ARGS, dynamicemb_record={"dim": 8}), "dynamicemb_record: 'dtype' is missing"),
    (lambda f: write_older(f, VALUES), "in the older and in the newer layout"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_broken_dumps(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    newer(tmp_path / "src" / COLLECTION)
    converted(tmp_path)  # which is fine before
    before = files_below(tmp_path / "dst")
    damage(tmp_path / "src" / COLLECTION)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", "native")
    assert files_below(tmp_path / "dst") == before
    assert {file.name for file in tmp_path.iterdir()} == {"src", "dst"}


@pytest.mark.parametrize(
    ("size", "message"),
    [(4, r"item_keys, offset 0: 4 bytes"), (8, r"item_values: 6400 bytes are|values, which are not")],
)
def test_broken_older_dumps(tmp_path: Path, size: int, message: str) -> None:
    write_older(tmp_path / "src" / COLLECTION, VALUES)
    truncate(tmp_path / "src" / COLLECTION / "item_keys", size)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", "native", dim=DIM)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("kind", list(OPT_ARGS))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_dump(tmp_path: Path, world_size: int, kind: str, dtype: str) -> None:
    """Names, sizes and content of every file, from the description of the layout."""
    arrays = random_rows(ROWS, DIM, dtype, kind)
    write_native(tmp_path / "src", {(COLLECTION, "item"): (record_of(DIM, dtype, kind), arrays)})
    convert(tmp_path / "src", tmp_path / "dst", "nvidia", world_size)
    values = arrays["values"].astype(np.float32)
    if dtype == "bfloat16":
        values = (arrays["values"].astype(np.uint32) << 16).view(np.float32)
    state = [arrays[f"opt_{name}"] for name, _ in states_of(kind, DIM)]
    rows = {key: (values[row], CLOCK - arrays["scores"][row], np.concatenate([part[row] for part in state] or [[]]))
            for row, key in enumerate(arrays["keys"].tolist())}  # fmt: skip
    files = files_below(tmp_path / "dst" / COLLECTION)
    for rank in range(world_size):
        suffix = f"rank_{rank}.world_size_{world_size}"
        keys = np.frombuffer(files.pop(f"item_emb_keys.{suffix}"), "<i8").tolist()
        found_values = np.frombuffer(files.pop(f"item_emb_values.{suffix}"), "<f4").reshape(-1, DIM)
        ages = np.frombuffer(files.pop(f"item_emb_scores.{suffix}"), "<i8")
        found_states = np.empty((len(keys), 0))
        if state:
            found_states = np.frombuffer(files.pop(f"item_emb_opt_values.{suffix}"), "<f4").reshape(len(keys), -1)
        assert len(keys) == len(found_values) == len(ages)
        for row, key in enumerate(keys):
            assert key % 2**64 % world_size == rank
            own_values, age, own_states = rows.pop(key)
            assert found_values[row].tobytes() == own_values.tobytes() and ages[row] == age
            assert found_states[row].astype("<f4").tobytes() == own_states.astype("<f4").tobytes()
    assert not rows and list(files) == ["item_opt_args.json"]
    check_opt_args(json.loads(files["item_opt_args.json"]), kind)


def check_opt_args(opt_args: dict[str, Any], kind: str) -> None:
    assert set(OPT_ARGS[kind]) | {"evict_strategy", "dist_type", "dynamicemb_record"} == set(opt_args)
    assert opt_args["opt_type"] == OPT_ARGS[kind]["opt_type"]
    assert opt_args["lr"] == HYPERPARAMETERS[kind]["learning_rate"]
    for name, number in HYPERPARAMETERS[kind].items():
        assert name == "learning_rate" or opt_args.get(name, number) == number
    assert opt_args["evict_strategy"] == "EvictStrategy.KLru" and opt_args["dist_type"] == "roundrobin"
    if kind == "adam":
        assert opt_args["iters"] == 321


def test_written_custom_scores(tmp_path: Path) -> None:
    arrays = random_rows(ROWS, DIM, "float32", "sgd", strategy="customized")
    write_native(tmp_path / "src", {(COLLECTION, "item"): (record_of(DIM, "float32", "sgd", "customized"), arrays)})
    convert(tmp_path / "src", tmp_path / "dst", "nvidia")
    folder = tmp_path / "dst" / COLLECTION
    found = dict(zip(np.fromfile(folder / "item_emb_keys.rank_0.world_size_1", "<i8").tolist(),
                     np.fromfile(folder / "item_emb_scores.rank_0.world_size_1", "<i8").tolist()))  # fmt: skip
    assert found == dict(zip(arrays["keys"].tolist(), arrays["scores"].tolist()))
    opt_args = json.loads((folder / "item_opt_args.json").read_text())
    assert opt_args["evict_strategy"] == "EvictStrategy.KCustomized" and opt_args["step_score"] == 17


def test_state_that_was_written_and_is_gone(tmp_path: Path) -> None:
    arrays = random_rows(ROWS, DIM, "float32", "adam")
    write_native(tmp_path / "native", {(COLLECTION, "item"): (record_of(DIM, "float32", "adam"), arrays)})
    convert(tmp_path / "native", tmp_path / "src", "nvidia")
    (tmp_path / "src" / COLLECTION / "item_emb_opt_values.rank_0.world_size_1").unlink()
    with pytest.raises(CheckpointError, match=r"opt_args.json: says that optimizer state was dumped, but"):
        convert(tmp_path / "src", tmp_path / "dst", "native")


def test_a_score_beyond_the_clock_is_refused(tmp_path: Path) -> None:
    """Its age would be negative: the checkpoint says two things that cannot both be."""
    arrays = random_rows(ROWS, DIM, "float32", "sgd")
    arrays["scores"][7] = CLOCK + 1
    write_native(tmp_path / "src", {(COLLECTION, "item"): (record_of(DIM, "float32", "sgd"), arrays)})
    with pytest.raises(CheckpointError, match=r"item: an LRU score of 5001"):
        convert(tmp_path / "src", tmp_path / "dst", "nvidia")
    assert detect(tmp_path / "src") == "native" and not (tmp_path / "dst").exists()
