"""Steps of a sharded collection as a GPU gets them: the host waits at most once, for sizes that ranks exchange, and the
number of kernels depends neither on the number of tables nor on that of features.

Collections live on the meta device (:mod:`tests.steady_state`), with two ranks where collectives are recorded in place
of running. What torchrec does is looked at like the rest: where it would wait or launch more, these tests would fail.
Batches come as a data loader hands them over: ``KeyedJaggedTensor.sync()`` on the host, then ``to(device)``. One that
has not been synced costs a wait of torchrec's own, which asks the device how to cut the batch into features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import DynamicEmbCheckMode, DynamicEmbEvictStrategy
from dynamicemb.planner import DynamicEmbeddingShardingPlanner
from dynamicemb.shard import DynamicEmbeddingCollectionSharder, ShardedDynamicEmbeddingCollection, input_dist
from tests.distributed import run_on_ranks
from tests.shard.models import CPU, NORMAL, collection, distribute, dynamic, table
from tests.steady_state import META, Step, meta_memory, recorded

SAMPLES = 4
IDS_PER_SAMPLE = 6
#: Keys of each table that each rank sends to each, where there are two.
KEYS_PER_RUN = 2
LFU, CUSTOMIZED = DynamicEmbEvictStrategy.LFU, DynamicEmbEvictStrategy.CUSTOMIZED


def sharded(
    tables: Sequence[EmbeddingConfig],
    options: Mapping[str, Mapping[str, Any]] = {},
    world_size: int = 1,
    device: torch.device = META,
    fused_params: Optional[dict[str, Any]] = None,
) -> ShardedDynamicEmbeddingCollection:
    """Rank 0 of a collection whose tables are all dynamic, trained with Adam unless ``fused_params`` say otherwise."""
    module = collection(*tables)
    if fused_params is None:
        apply_optimizer_in_backward(torch.optim.Adam, module.parameters(), {"lr": 0.1})
    sharder = DynamicEmbeddingCollectionSharder(fused_params=fused_params)
    constraints = {config.name: dynamic(**options.get(config.name, {})) for config in tables}
    topology = Topology(world_size=world_size, compute_device="cpu")
    plan = DynamicEmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)
    sharding = plan.plan(module, [sharder]).plan[""]
    env = ShardingEnv.from_local(world_size, 0)
    env.process_group = SimpleNamespace(size=lambda: world_size) if world_size > 1 else None
    with meta_memory() if device == META else nullcontext(), pytest.MonkeyPatch.context() as patch:
        # What ranks agree on before they shard: all of them say what this one does.
        patch.setattr(dist, "all_gather_object", lambda all, own, group: all.__setitem__(slice(None), [own] * len(all)))
        return sharder.shard(module, sharding, env, device)


def batch_of(
    features: Sequence[str], samples: int = SAMPLES, ids: int = IDS_PER_SAMPLE, dtype: torch.dtype = torch.int64
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.arange(len(features) * samples * ids).to(dtype),
        lengths=torch.full((len(features) * samples,), ids),
    ).sync()


@contextmanager
def ranks(step: Step, keys_per_run: int) -> Iterator[list[torch.Size]]:
    """Collectives that are recorded and do nothing, in an exchange where every rank sends every rank as many keys of
    each table. Yields the shapes of what the host asks for."""
    asked: list[torch.Size] = []

    def all_to_all_single(
        received: torch.Tensor,
        sent: torch.Tensor,
        receive_counts: Sequence[int] = (),
        send_counts: Sequence[int] = (),
        group: Any = None,
        async_op: bool = False,
    ) -> SimpleNamespace:
        assert async_op and group.size() == 2
        for tensor, counts in ((received, receive_counts), (sent, send_counts)):
            assert tensor.is_contiguous() and (not counts or sum(counts) == len(tensor))
        step.kernels.append("all_to_all")
        return SimpleNamespace(wait=lambda: None)

    def on_host(sizes: torch.Tensor) -> Any:
        asked.append(sizes.shape)
        directions, members, tables = sizes.shape
        return [[[keys_per_run] * tables] * members] * directions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", all_to_all_single)
        patch.setattr(input_dist, "_on_host", on_host)
        yield asked


def phases(model: ShardedDynamicEmbeddingCollection, batch: KeyedJaggedTensor) -> dict[str, Step]:
    """A training step and an evaluation. The loss has two kernels of its own, whatever the batch: it joins the features
    and, on the way back, cuts them apart, which is a view, and joins them again."""
    steps: dict[str, Step] = {}
    batch = batch.to(META)
    keys_per_run = min(KEYS_PER_RUN, batch.values().numel())
    for name in ("forward", "evaluation"):
        model.train(name == "forward")
        with torch.set_grad_enabled(name == "forward"), recorded() as step, ranks(step, keys_per_run) as asked:
            rows = torch.cat([jagged.values() for jagged in model(batch).values()])
        steps[name] = step
        assert len(asked) == (dist_of(model)._world_size > 1), "one wait for sizes, with several ranks only"
        if name == "forward":
            gradients = torch.empty_like(rows)
            with recorded() as step, ranks(step, keys_per_run) as asked:
                rows.backward(gradients)
            steps["backward"] = step
            assert not asked
    return steps


def dist_of(model: ShardedDynamicEmbeddingCollection) -> Any:
    return model._input_dists[-1]


def names(count: int) -> list[str]:
    return [f"t{index}" for index in range(count)]


# ------------------------------------------------------------------------------------------- waits

MANY = [table("t0"), table("t1"), table("t2"), table("t3", features=["t3", "t4", "t5"])]
STRATEGIES = {"t1": {"evict_strategy": LFU}, "t2": {"evict_strategy": CUSTOMIZED}}
CASES: dict[str, dict[str, Any]] = {
    "one group": {},
    "several groups": {"tables": MANY, "options": STRATEGIES},
    "an evaluation initializer": {"options": {name: {"eval_initializer_args": NORMAL} for name in names(3)}},
    "occurrences": {"options": {name: {"evict_strategy": LFU} for name in names(3)}},
    "half rows": {
        "options": {name: {"embedding_dtype": torch.float16} for name in names(3)},
        "fused_params": {
            "optimizer": EmbOptimType.ADAM,
            "learning_rate": 0.1,
            "output_dtype": SparseType.FP16,
            "stochastic_rounding": False,
        },
    },
    "features in another order": {"batch": batch_of(names(3)[::-1])},
    "int32 ids": {"batch": batch_of(names(3), dtype=torch.int32)},
    "uint64 ids": {"batch": batch_of(names(3), dtype=torch.uint64)},
    "no ids": {"batch": batch_of(names(3), ids=0)},
    "no ids and no integers": {"batch": batch_of(names(3), ids=0, dtype=torch.float32)},
    "no samples": {"batch": batch_of(names(3), samples=0)},
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_nothing_waits(name: str, world_size: int) -> None:
    case = dict(CASES[name])
    tables = case.pop("tables", [table(name) for name in names(3)])
    batch = case.pop("batch", batch_of([feature for config in tables for feature in config.feature_names]))
    model = sharded(tables, world_size=world_size, **case)
    phases(model, batch)  # the first step makes what all others use
    for phase, step in phases(model, batch).items():
        assert step.waits == [], phase
        assert step.kernels


@pytest.mark.parametrize("mode", [DynamicEmbCheckMode.ERROR, DynamicEmbCheckMode.WARNING])
def test_a_check_for_refused_keys_waits(mode: DynamicEmbCheckMode) -> None:
    """Documented so: what has been refused is counted on the device."""
    model, batch = sharded([table("t0")], {"t0": {"safe_check_mode": mode}}), batch_of(["t0"]).to(META)
    with recorded(), pytest.raises(NotImplementedError, match="meta"):
        model(batch).values()
    model.eval()
    with recorded() as step, torch.no_grad():
        model(batch).values()
    assert step.waits == []


@pytest.mark.parametrize(
    ("batch", "reads"),
    [
        (batch_of(["t0", "t1"]), 0),
        (batch_of(["t0", "t1"], dtype=torch.uint64), 0),
        (batch_of(["t0", "t1"], ids=0, dtype=torch.float32), 0),
        (batch_of(["t0", "t1"], samples=0), 0),
        (KeyedJaggedTensor(keys=["t0", "t1"], values=torch.arange(6), lengths=torch.tensor([1, 2, 3, 0])), 1),
    ],
    ids=["synced", "synced, uint64", "synced, no ids", "no samples", "not synced"],
)
def test_lengths_are_asked_for_only_if_the_batch_does_not_bring_them(
    batch: KeyedJaggedTensor, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where a list can be made of a tensor: torchrec answers with made-up lengths on the meta device."""
    model = sharded([table("t0"), table("t1")], device=CPU)
    lists: list[torch.Tensor] = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [lists.append(tensor), to_list(tensor)][1])
    for training in (True, False):
        model.train(training)
        assert all(len(jagged.values()) <= len(batch.values()) for jagged in model(batch).values())
        assert len(lists) == reads, "torchrec remembers what it has asked for"


# ------------------------------------------------------------------------------------------- kernels


def kernels(tables: int, features: int, world_size: int, **options: Any) -> dict[str, list[str]]:
    """By phase, for ``tables`` tables of one group with ``features`` features each."""
    by_table = [[f"t{index}_{feature}" for feature in range(features)] for index in range(tables)]
    configs = [table(f"t{index}", features=names) for index, names in enumerate(by_table)]
    model = sharded(configs, {config.name: options for config in configs}, world_size)
    batch = batch_of([feature for features_of_table in by_table for feature in features_of_table])
    phases(model, batch)
    return {phase: step.kernels for phase, step in phases(model, batch).items()}


def triton(*operations: str) -> list[str]:
    return [f"triton._{operation}_kernel" for operation in operations]


TABLES_OF_IDS = ["aten.sum.dim_IntList", *triton("repeat")]
DEDUP = [*triton("prefix"), "aten.sort.stable", *triton("compare", "settle", "number")]
TRAIN = triton("find", "insert", "fill", "tally", "gather")
#: A step's loss joins the rows of all features, and the gradient of what torchrec gives for each is joined again.
JOINED = "aten.cat.default"


def test_the_kernels_of_a_step_on_one_rank() -> None:
    """Of 26 tables, torch's and ours together."""
    seen = kernels(26, 1, 1)
    assert seen["forward"] == [*TABLES_OF_IDS, *DEDUP, *TRAIN, JOINED]
    assert seen["backward"] == [JOINED, *triton("begin_update", "update")]
    assert seen["evaluation"] == [*TABLES_OF_IDS, *triton("find", "gather"), JOINED]


@pytest.mark.parametrize("strategy", [DynamicEmbEvictStrategy.LRU, LFU])
def test_the_kernels_of_a_step_on_two_ranks(strategy: DynamicEmbEvictStrategy) -> None:
    """Sizes, keys and rows travel, and gradients on the way back; under LFU occurrences beside the keys."""
    seen = kernels(26, 1, 2, evict_strategy=strategy)
    lfu = strategy is LFU
    sent = triton("with_occurrences") if lfu else []
    received = ["aten.clone.default"] if lfu else []  # keys apart from occurrences
    keys = [*TABLES_OF_IDS, *DEDUP, *triton("count_runs"), "all_to_all", *sent, "all_to_all", *received]
    keys += triton("repeat")
    rows = ["all_to_all", *triton("gather_rows"), JOINED]
    assert seen["forward"] == [*keys, *DEDUP, *triton(*["sum_integers"] * lfu), *TRAIN, *rows]
    # The division by the number of ranks is torchrec's convention, which can be switched off.
    sums = [*triton("block_sums", "sum_rows"), "all_to_all", "aten.div_.Tensor"]
    assert seen["backward"] == [JOINED, *sums, *triton("begin_update", "update")]
    assert seen["evaluation"] == [*keys, *triton("find", "gather"), *rows]


@pytest.mark.parametrize("world_size", [1, 2])
def test_as_many_kernels_for_any_number_of_tables_and_features(world_size: int) -> None:
    one = kernels(1, 1, world_size)
    for tables, features in ((8, 1), (26, 1), (1, 26), (8, 3)):
        assert kernels(tables, features, world_size) == one, f"{tables} tables with {features} features"
    assert one["forward"].count("triton._insert_kernel") == one["backward"].count("triton._update_kernel") == 1
    collectives = {"forward": 3, "backward": 1, "evaluation": 3}
    for phase, count in collectives.items():
        assert one[phase].count("all_to_all") == (count if world_size == 2 else 0), phase
        # Rows that have travelled go to all places of their ids at once.
        expanded = world_size == 2 and phase != "backward"
        assert one[phase].count("triton._gather_rows_kernel") == expanded, phase


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_initializer_costs_one_kernel(world_size: int) -> None:
    """In evaluation; training does not know of it."""
    tables, batch = [table(name) for name in names(3)], batch_of(names(3))
    seen = []
    for options in ({}, {name: {"eval_initializer_args": NORMAL} for name in names(3)}):
        model = sharded(tables, options, world_size)
        phases(model, batch)
        seen.append({phase: Counter(step.kernels) for phase, step in phases(model, batch).items()})
    zeros, values = seen
    zeros["evaluation"]["triton._fill_missing_kernel"] += 1
    assert values == zeros


def operations_on_gloo(rank: int, world_size: int) -> list[tuple[list[str], int]]:
    """Operations of torch in a step, and lists made of tensors, for each number of tables: with real collectives and
    values, on the CPU engine, whose kernels are no operations of torch."""
    seen: list[tuple[list[str], int]] = []
    reads: list[torch.Size] = []
    to_list = torch.Tensor.tolist
    for tables in (1, 8, 26):
        options = dynamic(initializer_args=NORMAL, max_capacity=256, init_capacity=256)
        constraints = dict.fromkeys(names(tables), options)
        model = distribute(collection(*map(table, constraints)), constraints, (torch.optim.Adam, {"lr": 0.1}))
        batch = batch_of(names(tables))
        for _ in range(2):
            reads.clear()
            with recorded() as step, pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", lambda tensor: [reads.append(tensor.shape), to_list(tensor)][1])
                rows = torch.cat([jagged.values() for jagged in model(batch).values()])
                rows.backward(torch.ones_like(rows))
        seen.append((step.kernels, len(reads)))
    return seen


def test_two_ranks_with_gloo() -> None:
    for one, eight, many in run_on_ranks(2, operations_on_gloo):
        assert one == eight == many
        operations, reads = one
        assert reads == 1 and len(operations) > 10
