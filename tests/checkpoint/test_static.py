"""Dynamic tables that begin with the rows of static ones, from real state dicts of torchrec."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollection

from dynamicemb import CheckpointError, ConfigError, DynamicEmbError, DynamicEmbWarning
from dynamicemb.checkpoint import static
from dynamicemb.checkpoint.static import load_static
from dynamicemb.shard import get_score, table_statistics
from dynamicemb.shard.tables import dynamic_tables
from tests.checkpoint.models import contents, model, train
from tests.distributed import run_on_ranks
from tests.oracle import TableModel, owner
from tests.shard import models
from tests.shard.models import CPU, collection, distribute, dynamic, evaluated, table

ROWS, DIM = 300, 8
NAMES = ("t0", "t1")
#: ``embeddings`` is where tests/checkpoint/models.py has the collection.
START = "embeddings.embeddings"


def values(name: str) -> torch.Tensor:
    """What the static tables hold: no two values are the same."""
    first = 0 if name == "t0" else ROWS * DIM
    return (torch.arange(first, first + ROWS * DIM).reshape(ROWS, DIM) / 7).float()


class Holder(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.embeddings = EmbeddingCollection(tables=[table(name, ROWS, DIM) for name in NAMES], device=device)


def unsharded() -> dict[str, torch.Tensor]:
    holder = Holder(CPU)
    holder.load_state_dict({f"{START}.{name}.weight": values(name) for name in NAMES})
    return dict(holder.state_dict())


def sharded(sharding_type: str, world_size: int) -> dict[str, Any]:
    """The state dict of a static model that torchrec has sharded in the given way."""
    options: dict[str, Any] = {"min_partition": 4} if "column" in sharding_type else {}
    constraints = {name: ParameterConstraints(sharding_types=[sharding_type], **options) for name in NAMES}
    static_model = distribute(
        Holder(torch.device("meta")),
        constraints,
        (torch.optim.SGD, {"lr": 1.0}),
        EmbeddingCollectionSharder(),
        plain=True,
    )
    static_model.load_state_dict(copy.copy(unsharded()))
    return dict(static_model.state_dict())


def check(module: nn.Module, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = NAMES) -> None:
    """This rank has the rows of the ids that it owns, with score 0 and fresh optimizer state."""
    for one in dynamic_tables(module):
        if one.name not in names:
            continue
        ids = [key for key in range(ROWS) if owner(key, dist.get_world_size()) == dist.get_rank()]
        stored = one.group.stored_rows(one.index)
        order = torch.argsort(stored.keys)
        assert stored.keys[order].tolist() == ids
        assert torch.equal(stored.embeddings[order], values(one.name)[ids].to(dtype))
        assert not stored.scores.any()
        assert all(
            (state == one.group.configs[one.index].optimizer.initial_state).all() for state in stored.states.values()
        )
        assert one.group.progress(one.index).steps == 0


def _sources(rank: int, world_size: int, kind: str) -> None:
    static._PIECE_BYTES, static._SCANNED_IDS = 40 * DIM * 4, 64  # several pieces of each table
    module = model("adagrad", tables=2, capacity=4096)
    train(module, range(3), rank, world_size)
    clock, hits = get_score(module), table_statistics(module)["t0"].hits
    state = unsharded() if kind == "unsharded" else _dtensors(kind) if "tensor" in kind else sharded(kind, world_size)
    if kind in ("row_wise", "column_wise", "table_wise", "table_row_wise"):
        assert isinstance(state[f"{START}.t0.weight"], ShardedTensor)
    load_static(module, state)
    check(module)
    assert get_score(module) == clock and table_statistics(module)["t0"].hits == hits
    ids = {name: torch.arange(ROWS) for name in NAMES}
    rows = evaluated(module.module.embeddings, ids)
    assert all(torch.equal(rows[name], values(name)) for name in NAMES)
    before = contents(module)
    train(module, range(3, 5), rank, world_size)
    assert contents(module) != before


def _torchrec_dtensors(rank: int, world_size: int) -> None:
    """torchrec's tables as it shows them if it is told to use DTensors, on some of the ranks none of a table."""
    plain_environment = models._environment

    def environment(group: dist.ProcessGroup) -> ShardingEnv:
        env = plain_environment(group)
        env.device_mesh, env.output_dtensor = init_device_mesh("cpu", (world_size,)), True
        return env

    for kind in ("row_wise", "column_wise", "table_wise"):
        models._environment = environment
        state = sharded(kind, world_size)
        assert type(state[f"{START}.t0.weight"]) is DTensor
        models._environment = plain_environment
        module = model("adagrad", tables=2, capacity=4096)
        load_static(module, state)
        check(module)


def test_dtensors_of_torchrec() -> None:
    run_on_ranks(2, _torchrec_dtensors)


def _dtensors(kind: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placement = {"dtensor_rows": Shard(0), "dtensor_columns": Shard(1), "dtensor_all": Replicate()}[kind]
    return {f"{START}.{name}.weight": distribute_tensor(values(name), mesh, [placement]) for name in NAMES}


@pytest.mark.parametrize(
    "kind",
    [
        "unsharded",
        "row_wise",
        "column_wise",
        "table_wise",
        "data_parallel",
        "dtensor_rows",
        "dtensor_columns",
        "dtensor_all",
    ],
)
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_row_i_becomes_the_row_of_id_i(world_size: int, kind: str) -> None:
    run_on_ranks(world_size, _sources, kind)


def _one_rank_has_it(rank: int, world_size: int) -> None:
    """A ShardedTensor all of whose rows are on one rank, beside a tensor that all ranks have; and other dtypes."""
    for dtype in (torch.float16, torch.bfloat16):
        module = model("rowwise_adagrad", tables=2, capacity=4096, embedding_dtype=dtype)
        state = sharded("table_wise", world_size)
        state[f"{START}.t1.weight"] = values("t1").double()
        load_static(module, state)
        check(module, dtype)


def test_rows_are_converted() -> None:
    run_on_ranks(2, _one_rank_has_it)


def _some_tables(rank: int, world_size: int) -> None:
    module = model(tables=2, capacity=4096)
    train(module, range(2), rank, world_size)
    own = contents(module)["t0"]
    # Another path than that of the model's collection: the only table of that name is meant.
    state = {f"somewhere.else.embeddings.{name}.weight": values(name) for name in NAMES}
    load_static(module, state, {"model.embeddings": ["t1"]})
    check(module, names=("t1",))
    assert contents(module)["t0"] == own
    load_static(module.module.embeddings, {f"embeddings.{name}.weight": values(name) for name in NAMES})
    check(module)
    # Of several, that of the model's own path.
    state = {f"somewhere.else.embeddings.{name}.weight": torch.zeros_like(values(name)) for name in NAMES}
    load_static(module, state | {f"embeddings.embeddings.{name}.weight": values(name) for name in NAMES})
    check(module)


def test_some_tables_and_other_paths() -> None:
    run_on_ranks(2, _some_tables)


def _full(rank: int, world_size: int) -> tuple[int, list[str]]:
    module = distribute(
        collection(table("t0", ROWS, DIM)),
        {"t0": dynamic(max_capacity=64, bucket_capacity=8)},
        (torch.optim.SGD, {"lr": 1.0}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DynamicEmbWarning)
        load_static(module, {"embeddings.t0.weight": values("t0")})
    rows = contents(module)["t0"]
    assert all(row[1] == values("t0")[key].numpy().tobytes() for key, row in rows.items())
    return len(rows), [str(one.message) for one in caught if issubclass(one.category, DynamicEmbWarning)]


def test_rows_without_a_place_are_counted() -> None:
    expected = 0
    for rank in range(2):
        place = TableModel(64, 64, 8, 2, rank)
        buckets = Counter(place.bucket(key) for key in range(ROWS) if owner(key, 2) == rank)
        expected += sum(min(rows, 8) for rows in buckets.values())
    results = run_on_ranks(2, _full)
    assert sum(rows for rows, _ in results) == expected < ROWS
    for _, messages in results:
        assert len(messages) == 1 and f"{ROWS - expected} of {ROWS} rows" in messages[0]


def _refused(rank: int, world_size: int) -> None:
    module = model(tables=2, capacity=4096)
    train(module, range(2), rank, world_size)
    before = contents(module), table_statistics(module)
    good = unsharded()
    key = f"{START}.t1.weight"
    halves = {key: values("t1")[: ROWS // 2]} if rank else {}
    only_rank_0 = {key: values("t1")[:, :7]} if rank == 0 else {}
    cases: list[tuple[dict[str, Any], str]] = [
        ({f"{START}.t0.weight": good[f"{START}.t0.weight"]}, "t1"),
        ({**good, key: values("t1")[:, :7]}, "its shape is .300, 7., the dynamic table has rows of 8"),
        ({**good, **only_rank_0}, "its shape is|failed"),
        ({**good, **halves}, "differs between ranks"),
        ({**good, key: values("t1").flatten()}, "its shape is"),
        ({**good, key: "rows"}, "no tensor"),
    ]
    lost = sharded("row_wise", world_size)
    lost[key].local_shards().clear()
    cases.append((lost, "all the ranks"))
    other = {f"a.embeddings.{name}.weight": values(name) for name in NAMES}
    cases.append(({**other, **{name.replace("a.", "b."): value for name, value in other.items()}}, "could be meant"))
    for state, message in cases:
        with pytest.raises(DynamicEmbError, match=message) as caught:
            load_static(module, state)
        assert isinstance(caught.value, CheckpointError) or rank == 1
        assert (contents(module), table_statistics(module)) == before
    with pytest.raises(ConfigError, match="no dynamic table 'x'"):
        load_static(module, good, {"model.embeddings": ["x"]})


def test_what_does_not_fit_is_refused_on_all_ranks_before_anything_changes() -> None:
    run_on_ranks(2, _refused)
