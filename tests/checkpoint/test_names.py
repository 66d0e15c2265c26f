"""Any name of a table or a collection goes all the way, or is refused before anything is planned or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import nn

from dynamicemb import ConfigError, DynamicEmbDump, DynamicEmbLoad, incremental_dump
from dynamicemb.checkpoint import dcp
from dynamicemb.checkpoint.convert import convert
from dynamicemb.checkpoint.merge import merge
from dynamicemb.cli.model import chosen_tables
from dynamicemb.names import MAX_COLLECTION_BYTES, MAX_TABLE_BYTES, unstorable
from dynamicemb.shard.tables import dynamic_tables
from tests.checkpoint.histories import files
from tests.checkpoint.models import OPTIMIZERS, Model, contents
from tests.cli.command import dynamicemb
from tests.distributed import run_on_ranks
from tests.shard.models import NORMAL, collection, distribute, dynamic, one_sample, table

NAMES = [
    "plain", "with space", " leading and trailing ", "ümläut", "u\u0308", "\u00fc", "Case", "case", "日本", "🙂",
    "a" * 200, "ü" * 100,
    "%2F", "%", "a'b", 'a"b', "a\\b", "a,b", "a=b", "a:b", "new\nline", "tab\t", "-x", "--table", "*", "c?",
    "[a]", "[bold]a", "CON", "manifest", "_keys", "a_opt", "a_opt_sum", "a_keys", "~", "$HOME", "#", ";", "1",
]  # fmt: skip
#: Those that torch does not take as the name of a module.
DOTTED = ["a.b", ".hidden", "manifest.json", "..."]
REFUSED = ["user/id", "/", "a/", "", ".", "..", "zero\0byte", "\ud800", "a" * 201, "ü" * 101]


def _model(names: list[str]) -> nn.Module:
    options = {"initializer_args": NORMAL, "bucket_capacity": 16}
    embeddings = collection(*(table(name, 64, 4, [f"f{n}"]) for n, name in enumerate(names)))
    return distribute(Model(embeddings), {name: dynamic(**options) for name in names}, OPTIMIZERS["rowwise_adagrad"])


def _train(module: nn.Module, tables: int, ids: int) -> None:
    module(one_sample({f"f{n}": torch.arange(n, n + ids) for n in range(tables)})).backward()


def _all_the_way(rank: int, world_size: int, name: str) -> None:
    folder, tables = Path(name), len(NAMES)
    module = _model(NAMES)
    _train(module, tables, 6)
    DynamicEmbDump(folder / "full", module, optim=True)
    _train(module, tables, 3)
    incremental_dump(folder / "delta", module, folder / "full", {"model.embeddings": NAMES}, optim=True)
    DynamicEmbDump(folder / "later", module, optim=True)
    merge([folder / "full", folder / "delta"], folder / "merged")
    assert files(folder / "merged") == files(folder / "later")
    loaded = _model(NAMES)
    DynamicEmbLoad([folder / "full", folder / "delta"], loaded, {"model.embeddings": NAMES}, optim=True)
    assert contents(loaded) == contents(module)
    asked = ["a,b", "model.embeddings=a=b", " leading and trailing ", "-x,1"]
    assert chosen_tables(asked, module) == {"model.embeddings": ["a,b", "a=b", " leading and trailing ", "-x", "1"]}
    torch_dcp.save(module.state_dict(), checkpoint_id=folder / "dcp")
    other = _model(NAMES)
    dcp.load(other, folder / "dcp")
    assert contents(other) == contents(module)
    torch.save(module.state_dict(), folder / "state")
    again = _model(NAMES)
    again.load_state_dict(torch.load(folder / "state", weights_only=False))
    assert contents(again) == contents(module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    run_on_ranks(1, _all_the_way, str(folder))
    return folder


@pytest.mark.parametrize("to", ["parquet", "safetensors", "nvidia"])
def test_names_go_through_other_formats(to: str, folder: Path, tmp_path: Path) -> None:
    convert(folder / "full", tmp_path / "other", to, world_size=2 if to == "nvidia" else None)
    convert(tmp_path / "other", tmp_path / "back", "native")
    for own in ("keys", "values"):
        for name in NAMES:
            file = Path("model.embeddings", f"{name}_{own}")
            assert (tmp_path / "back" / file).read_bytes() == (folder / "full" / file).read_bytes(), file


def test_names_in_the_command(folder: Path) -> None:
    full, delta, later = (folder / name for name in ("full", "delta", "later"))
    for name in NAMES:
        result = dynamicemb("get", full, "--json", "--", name, len(NAMES) + 1)
        assert result.document["table"] == name, result.err
        shown = dynamicemb("inspect", delta, f"--table={name}", "--json")
        assert [entry["table"] for entry in shown.document["tables"]] == [name]
    assert dynamicemb("verify", full).code == 0
    compared = dynamicemb("diff", full, later, "--json").document["tables"]
    assert sorted(entry["table"] for entry in compared) == sorted(NAMES)
    for arguments in (("inspect", full), ("diff", full, later), ("inspect", full, "--table=[bold]a")):
        assert not dynamicemb(*arguments).err


@pytest.mark.parametrize("name", REFUSED + DOTTED)
def test_what_can_be_stored(name: str) -> None:
    assert (unstorable(name, MAX_TABLE_BYTES) is not None) == (name in REFUSED)


def _refused_when_planning(rank: int, world_size: int) -> list[tuple[str, str]]:
    messages = []
    for name in REFUSED:
        try:
            _model([name])
        except (ConfigError, KeyError) as error:  # torch itself refuses names that are empty or have dots
            messages.append((type(error).__name__, str(error)))
    return messages


def test_other_names_are_refused_when_planning() -> None:
    [messages] = run_on_ranks(1, _refused_when_planning)
    for name, (kind, message) in zip(REFUSED, messages, strict=True):
        if name not in ("", ".", ".."):
            assert kind == "ConfigError" and repr(name) in message and "cannot be stored" in message, (kind, message)


class _Towers(nn.Module):
    """Collections under any names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: collection(table("item", 64, 4, ["f0"])) for name in names})

    def forward(self, features: Any) -> torch.Tensor:
        return torch.stack(
            [rows["f0"].values().sum() for rows in (one(features) for one in self.towers.values())]
        ).sum()


def _collections(rank: int, world_size: int, name: str) -> None:
    folder = Path(name)
    towers = ["with space", "ü", "a=b,c", "new\nline", "x" * (MAX_COLLECTION_BYTES - len("model.towers."))]
    modules = [distribute(_Towers(towers), {"item": dynamic(bucket_capacity=16)}) for _ in range(2)]
    _train(modules[0], 1, 5)
    DynamicEmbDump(folder / "full", modules[0])
    _train(modules[0], 1, 3)
    incremental_dump(folder / "delta", modules[0], folder / "full")
    DynamicEmbLoad([folder / "full", folder / "delta"], modules[1])
    tables = zip(*(dynamic_tables(module) for module in modules), strict=True)
    for one, other in tables:
        assert one.path == other.path and one.group.stored_rows(0).keys.numel() == 5
        assert torch.equal(one.group.stored_rows(0).embeddings, other.group.stored_rows(0).embeddings)
    for tower in ("user/id", "x" * MAX_COLLECTION_BYTES):
        with pytest.raises(ConfigError, match=r"its collection, 'model.towers.*cannot be stored in a checkpoint"):
            distribute(_Towers([tower]), {"item": dynamic()})
    # Wrapped in a model that was not planned: only the dump sees the whole path.
    wrapped = nn.ModuleDict({"user/id": modules[0]})
    for write in (DynamicEmbDump, lambda path, module: incremental_dump(path, module, 0)):
        with pytest.raises(ConfigError, match=r"collection 'model.user/id.*cannot be stored in a checkpoint"):
            write(folder / "wrapped", wrapped)
    assert sorted(path.name for path in folder.iterdir()) == ["delta", "full"]


def test_names_of_collections(tmp_path: Path) -> None:
    run_on_ranks(1, _collections, str(tmp_path))
