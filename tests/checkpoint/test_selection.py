"""Which tables a call is about, by names that may be wrong in many ways; collections that have moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynamicemb import CheckpointError, ConfigError, DynamicEmbDump, DynamicEmbError, DynamicEmbLoad, incremental_dump
from dynamicemb.checkpoint.static import load_static
from dynamicemb.cli.model import renamed_collections
from tests.checkpoint.models import contents, model
from tests.distributed import run_on_ranks
from tests.shard.models import collection, distribute, dynamic, one_sample, table

COLLECTION = "model.embeddings"
WRONG: list[tuple[Any, str]] = [
    ({}, "names no table.*or None for all"),
    ([], "is list, not a mapping"),
    ([COLLECTION], "is list, not a mapping"),
    ("t0", "is str, not a mapping"),
    ({"t0"}, "is set, not a mapping"),
    ({COLLECTION: "t0"}, "'t0' is not a list of names"),
    ({COLLECTION: b"t0"}, "is not a list of names"),
    ({COLLECTION: None}, "None is not a list of names"),
    ({COLLECTION: []}, "names no table"),
    ({COLLECTION: ["t0"], "model.other": []}, "'model.other'. names no table"),
    ({COLLECTION: ["t0", "t0"]}, "names 't0' twice"),
    ({COLLECTION: [3]}, "3 is not the name of a table"),
    ({3: ["t0"]}, "3 is not the name of a table"),
    ({COLLECTION: ["t9"]}, r"no dynamic table 't9'.*it has model.embeddings/t0.*did you mean 'model.embeddings/t\d'"),
    ({"embeddings": ["t0"]}, "no dynamic table 't0' in 'embeddings'.*did you mean 'model.embeddings/t0'"),
    ({"model.embedding": ["t0"]}, "did you mean 'model.embeddings/t0'"),
]
RIGHT: list[Any] = [
    {COLLECTION: ["t0"]}, {COLLECTION: ("t0",)}, {COLLECTION: {"t0"}}, {COLLECTION: iter(["t0"])},
    {COLLECTION: {"t0": 1}},
]  # fmt: skip


def _table_names(rank: int, world_size: int, folder: str) -> None:
    module, good = model(tables=2), f"{folder}/good"
    DynamicEmbDump(good, module)
    calls = (
        lambda names: DynamicEmbDump(f"{folder}/other", module, names),
        lambda names: incremental_dump(f"{folder}/other", module, 0, names),
        lambda names: DynamicEmbLoad(good, module, names),
    )
    for names, message in WRONG:
        for call in calls:
            # Wrong on the last rank alone, it is an error on all of them.
            with pytest.raises(DynamicEmbError, match=message):
                call(names if rank == world_size - 1 else {COLLECTION: ["t0"]})
        if world_size == 1:
            with pytest.raises(ConfigError, match=message):
                load_static(module, {}, names)
    if world_size > 1:
        for call in calls:
            with pytest.raises(ConfigError, match=r"rank 1 asks for model.embeddings/t1, but rank 0 for .*t0"):
                call({COLLECTION: [f"t{rank}"]})
    assert [path.name for path in Path(folder).iterdir()] == ["good"]
    for number, names in enumerate(RIGHT):
        DynamicEmbDump(f"{folder}/{number}", module, names)
        DynamicEmbLoad(f"{folder}/{number}", module, {COLLECTION: ["t0"]})


@pytest.mark.parametrize("world_size", [1, 2])
def test_names_of_tables(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _table_names, str(tmp_path))


class _Net(nn.Module):
    """What was trained inside a model, as ``net``; it is a model itself as well."""

    def __init__(self, names: tuple[str, ...] = ("t0", "t1")) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"embeddings": collection(*(table(name, 128, 4) for name in names))})
        self.other = collection(table("user", 128, 4))


def _distributed(module: nn.Module) -> nn.Module:
    names = ("t0", "t1", "user", "more")
    here = [config.name for part in module.modules() for config in getattr(part, "embedding_configs", list)()]
    return distribute(module, {name: dynamic(bucket_capacity=16) for name in names if name in here})


def _train(part: Any, rank: int, *ids: int) -> None:
    output = part(one_sample({"t0": torch.tensor(ids) + rank, "t1": torch.tensor(ids) * 3}))
    sum(rows.values().sum() for rows in output.values()).backward()


def _moved(rank: int, world_size: int, name: str) -> None:
    folder = Path(name)
    whole = _distributed(_Net())
    _train(whole.module.net["embeddings"], rank, 1, 2, 3, 4)
    DynamicEmbDump(folder / "whole", whole)
    names = {"model": ["t0", "t1"]}

    # What was at model.net.embeddings and is the model itself now.
    alone = _distributed(collection(table("t0", 128, 4), table("t1", 128, 4)))
    with pytest.raises(
        DynamicEmbError, match=r"no table 't0' in 'model'.*collections=\{'model': 'model.net.embeddings'\}.*table_names"
    ):
        DynamicEmbLoad(folder / "whole", alone, names)
    mapping = {"model": "model.net.embeddings"}
    with pytest.raises(DynamicEmbError, match=r"has table 'user' in 'model.other', which the model does not"):
        DynamicEmbLoad(folder / "whole", alone, collections=mapping)
    DynamicEmbLoad(folder / "whole", alone, names, collections=mapping)
    expected = contents(whole)
    del expected["user"]
    assert contents(alone) == expected

    # Deltas have the path of the model that wrote them, whichever it is.
    _train(alone, rank, 4, 5)
    with pytest.raises(DynamicEmbError, match=r"no table 't0' in 'model'.*if it has moved, give collections"):
        incremental_dump(folder / "delta", alone, folder / "whole")
    incremental_dump(folder / "delta", alone, folder / "whole", collections=mapping)
    again = _distributed(collection(table("t0", 128, 4), table("t1", 128, 4)))
    DynamicEmbLoad([folder / "whole", folder / "delta"], again, collections=mapping)
    assert contents(again) == contents(alone)
    back = _distributed(_Net())
    net = {"model.net.embeddings": ["t0", "t1"]}
    DynamicEmbLoad([folder / "whole", folder / "delta"], back, net, collections={"model.net.embeddings": "model"})
    assert {**contents(back), "user": {}} == {**contents(alone), "user": {}}

    # Everything else is one error, on all ranks, and nothing changes.
    before = contents(alone)
    for wrong, message in (
        ({"model.nte": "model.net.embeddings"}, "no collection 'model.nte'.*it has model"),
        ({3: "model"}, "no collection 3"),
        ({"model": "model.net.embedings"}, "no collection 'model.net.embedings'.*did you mean 'model.net.embeddings'"),
        ({"model": 3}, "is not the path of a collection"),
        ({"model": None}, "is not the path of a collection"),
        ("model=model.net", "is str, not a mapping"),
        ([], "is list, not a mapping"),
        ({"model": "model.other"}, "no table 't0' in 'model.other'"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            DynamicEmbLoad(folder / "whole", alone, names, collections=wrong)  # type: ignore[arg-type]
    assert contents(alone) == before

    assert renamed_collections(["model=model.net=a"], alone) == {"model": "model.net=a"}
    assert renamed_collections(["model.other=model", "unknown=x"], whole) == {"model.other": "model", "unknown": "x"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_collections_that_have_moved(world_size: int, tmp_path: Path) -> None:
    run_on_ranks(world_size, _moved, str(tmp_path))
