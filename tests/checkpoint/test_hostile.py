"""Damaged, foreign and ill-fitting checkpoints: one error with file, offset and remedy; the model is as it was."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamicemb import (
    CheckpointError,
    ConfigError,
    DynamicEmbDump,
    DynamicEmbEvictStrategy,
    DynamicEmbLoad,
    RemoteRankError,
)
from dynamicemb.checkpoint import load
from dynamicemb.shard import table_statistics
from tests.checkpoint.models import contents, model, train
from tests.distributed import run_on_ranks

Change = Callable[[dict[str, Any]], None]


def _file(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / "model.embeddings" / name


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def _edit(folder: Path, change: Change, checksum: bool = True) -> None:
    """Changes the manifest as someone would who knows the format, its checksum included."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    if checksum:
        document.pop("crc32")
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["crc32"] = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(document))


def _table(document: dict[str, Any]) -> dict[str, Any]:
    return document["collections"]["model.embeddings"]["t1"]


def _manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def _set(**fields: Any) -> Callable[[Path], None]:
    """Fields of the table in the middle."""
    return lambda folder: _edit(folder, lambda document: _table(document).update(fields))


def _duplicate(folder: Path) -> None:
    """A key twice, and the checksum of the file that has it."""
    path = folder / "model.embeddings" / "t1_keys"
    data = path.read_bytes()
    data = data[:80] + data[72:80] + data[88:]
    path.write_bytes(data)
    _edit(folder, lambda document: _table(document)["parts"]["keys"].update(crc32=[f"{zlib.crc32(data):08x}"]))


def _swapped(folder: Path) -> None:
    """Two tables' files exchanged, and the manifest's entries with them: every checksum is right."""
    for part in ("keys", "values", "scores", "opt_exp_avg", "opt_exp_avg_sq"):
        first, second = (folder / "model.embeddings" / f"{name}_{part}" for name in ("t0", "t1"))
        first.rename(first.with_suffix(".x"))
        second.rename(first)
        first.with_suffix(".x").rename(second)

    def change(document: dict[str, Any]) -> None:
        tables = document["collections"]["model.embeddings"]
        for part in tables["t0"]["parts"]:
            for name in ("shape", "crc32"):
                one, other = tables["t0"]["parts"][part], tables["t1"]["parts"][part]
                one[name], other[name] = other[name], one[name]
        tables["t0"]["rows"], tables["t1"]["rows"] = tables["t1"]["rows"], tables["t0"]["rows"]

    _edit(folder, change)


def _renamed_state(folder: Path) -> None:
    """A state that no optimizer has, with everything else in order."""
    _file("t1_opt_exp_avg")(folder).rename(_file("t1_opt_momentum")(folder))

    def change(document: dict[str, Any]) -> None:
        parts = _table(document)["parts"]
        parts["opt_momentum"] = {**parts.pop("opt_exp_avg"), "file": "t1_opt_momentum"}

    _edit(folder, change)


#: What is done to a checkpoint, and what the error says. ``t1`` is the table in the middle.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: _file("t1_values")(f).open("r+b").truncate(40), r"t1_values, offset 40: 40 bytes.*restore"),
    "too long": (lambda f: _file("t1_scores")(f).open("ab").write(b"x"), r"t1_scores, offset \d+: \d+ bytes.*restore"),
    "empty": (lambda f: _file("t2_opt_exp_avg")(f).write_bytes(b""), r"t2_opt_exp_avg, offset 0: 0 bytes"),
    "key flipped": (lambda f: _flip(_file("t1_keys")(f), 40), r"t1_keys, offset \d+: "),
    "value flipped": (lambda f: _flip(_file("t1_values")(f), 99), r"t1_values, offset 0: segment 0 has.*restore"),
    "score flipped": (lambda f: _flip(_file("t1_scores")(f), 99), r"t1_scores, offset 0: segment 0 has the CRC-32"),
    "state flipped": (lambda f: _flip(_file("t2_opt_exp_avg_sq")(f), 3), r"t2_opt_exp_avg_sq, offset 0: segment 0 has"),
    "missing file": (lambda f: _file("t1_scores")(f).unlink(), r"t1_scores: No such file.*restore"),
    "missing folder": (lambda f: shutil.rmtree(f / "model.embeddings"), r"No such file.*restore"),
    "missing manifest": (lambda f: _manifest(f).unlink(), r"manifest.json: no such file.*never finished"),
    "manifest truncated": (lambda f: _manifest(f).open("r+b").truncate(500), r"offset \d+: not JSON.*restore"),
    "manifest not text": (lambda f: _manifest(f).write_bytes(b"\xff\xfe{}"), r"json, offset 0: not UTF-8"),
    "manifest flipped": (
        lambda f: _edit(f, lambda d: _table(d).update(clock=3), checksum=False), r"manifest.json: .*CRC-32",
    ),
    "manifest too deep": (lambda f: _manifest(f).write_text("[" * 100_000), r"json, offset \d+: not .*restore"),
    "number too long": (lambda f: _manifest(f).write_text('{"version": ' + "9" * 5000 + "}"), r"json, offset 0: not"),
    "state renamed": (_renamed_state, r"'t1' has the optimizer states .*momentum.*restore"),
    "foreign": (lambda f: _manifest(f).write_text('{"format": "other"}'), r"manifest.json: not a checkpoint"),
    "newer version": (lambda f: _edit(f, lambda d: d.update(version=2)), r"version 2.*up to version 1: upgrade"),
    "count too great": (_set(rows=2**62), r"'rows' is \d+, outside"),
    "count negative": (_set(rows=-1), r"'rows' is -1, outside"),
    "count not a number": (_set(rows="9"), r"'rows' is '9', not an integer"),
    "dim overflows": (_set(dim=2**40), r"'dim' is \d+, outside"),
    "field missing": (lambda f: _edit(f, lambda d: _table(d).pop("clock")), r"'clock' is missing"),
    "leads elsewhere": (
        lambda f: _edit(f, lambda d: d["collections"].update({"../x": d["collections"].pop("model.embeddings")})),
        r"'../x' cannot be a name",
    ),
    "another file named": (
        lambda f: _edit(f, lambda d: _table(d)["parts"]["keys"].update(file="../../passwd")), r"file is '../../passwd'",
    ),
    "lineage no array": (_set(follows=3), r"'follows' is 3"),
    "lineage no object": (_set(follows=[3]), r"has 3, not an object"),
    "lineage without step": (_set(follows=[{"digest": None}]), r"'step' is missing"),
    "lineage before step 0": (_set(follows=[{"step": -1, "digest": None}]), r"'step' is -1, outside"),
    "lineage no digest": (_set(follows=[{"step": 1, "digest": "abc"}]), r"'abc', not 32 hexadecimal digits"),
    "duplicate keys": (_duplicate, r"t1_keys, offset 80: key -?\d+ occurs twice"),
    "swapped tables": (_swapped, r"t0_keys, offset 0: \d+ keys, which are not the \d+ that the table had|t1_keys"),
    "swapped parts": (
        lambda f: (_file("t1_keys")(f).rename(f / "x"), _file("t1_scores")(f).rename(_file("t1_keys")(f)),
                   (f / "x").rename(_file("t1_scores")(f))),
        r"t1_keys, offset \d+: ",
    ),
}  # fmt: skip


def _damaged(rank: int, world_size: int, folder: str) -> dict[str, list[str]]:
    """Messages by damage, of a load into a model that is empty and of one that is not."""
    fresh, trained = model("adam"), model("adam")
    train(trained, range(90, 93), rank, world_size)
    before = contents(trained), table_statistics(trained)
    messages: dict[str, list[str]] = {}
    for name in DAMAGE:
        for target in (fresh, trained):
            try:
                DynamicEmbLoad(f"{folder}/{name}", target, optim=True)
                messages.setdefault(name, []).append("no error")
            except (CheckpointError, RemoteRankError) as error:
                messages.setdefault(name, []).append(str(error))
        assert not any(contents(fresh).values()), name
        assert (contents(trained), table_statistics(trained)) == before, name
    DynamicEmbLoad(f"{folder}/good", fresh, optim=True)
    again = model("adam")
    DynamicEmbLoad(f"{folder}/good", again, optim=True)
    losses = [train(one, range(4, 10), rank, world_size) for one in (fresh, again)]
    assert losses[0] == losses[1], "a load that failed has left something behind"
    with pytest.MonkeyPatch.context() as patch:  # good when it is checked, and gone when it is read again
        patch.setattr(load, "from_disk", _gone)
        with pytest.raises((CheckpointError, RemoteRankError), match="gone"):
            DynamicEmbLoad(f"{folder}/good", trained, optim=True)
    assert not any(contents(trained).values())
    assert all(table.size == 0 for table in table_statistics(trained).values())
    return messages


def _gone(*arguments: object) -> None:
    raise CheckpointError("gone")


def _good(rank: int, world_size: int, folder: str) -> None:
    module = model("adam", tables=3)
    train(module, range(4), rank, world_size)
    DynamicEmbDump(f"{folder}/good", module, optim=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    run_on_ranks(2, _good, str(folder))
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(folder / "good", folder / name)
        damage(folder / name)
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_error_and_an_unchanged_model(world_size: int, folder: Path) -> None:
    for messages in run_on_ranks(world_size, _damaged, str(folder)):
        for name, (_, expected) in DAMAGE.items():
            for message in messages[name]:
                assert re.search(expected, message), f"{name}: {message}"


def _misfits(rank: int, world_size: int, folder: str) -> list[str]:
    messages = []
    path, other = f"{folder}/good", f"{folder}/other"
    DynamicEmbDump(other, model("adam", tables=2))
    for arguments, options in (
        ({"dim": 12}, {"path": path}),
        ({"embedding_dtype": torch.bfloat16}, {"path": path}),
        ({"strategy": DynamicEmbEvictStrategy.LFU}, {"path": path}),
        ({"optimizer": "sgd"}, {"path": path}),
        ({"tables": 2}, {"path": path}),
        ({"tables": 3}, {"path": other, "optim": False}),
        ({"tables": 2}, {"path": other}),
        ({"tables": 3}, {"path": path, "table_names": {"model.embeddings": ["t9"]}}),
        ({"tables": 3}, {"path": path, "table_names": {"embeddings": ["t0"]}}),
        ({"tables": 3}, {"path": f"{folder}/nothing"}),
    ):
        module = model(**{"optimizer": "adam", **arguments})
        try:
            DynamicEmbLoad(model=module, **{"optim": True, **options})
            messages.append("no error")
        except (CheckpointError, ConfigError) as error:
            messages.append(str(error))
        assert not any(contents(module).values())
    return messages


def test_a_checkpoint_that_does_not_fit(folder: Path) -> None:
    [messages] = run_on_ranks(1, _misfits, str(folder))
    expected = [
        r"'t0' has dim 8, but the model's has 12",
        r"'t0' has dtype float32, but the model's has bfloat16",
        r"'t0' has evict_strategy lru, but the model's has lfu",
        r"'t0' has the optimizer adam, but the model's has sgd; load it with optim=False",
        r"has table 't2' in 'model.embeddings', which the model does not.*table_names",
        r"no table 't2' in 'model.embeddings'.*table_names",
        r"'t0' was saved without optimizer state; load it with optim=False",
        r"no dynamic table 't9' in 'model.embeddings'; it has model.embeddings/t0",
        r"no dynamic table 't0' in 'embeddings'",
        r"nothing/manifest.json: no such file",
    ]
    for message, pattern in zip(messages, expected, strict=True):
        assert re.search(pattern, message), message
