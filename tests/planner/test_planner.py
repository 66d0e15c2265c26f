"""Plans: their entries, their budget, what is printed, and how they fail."""

import copy
import functools
import logging
import pickle
import warnings

import pytest
import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.stats import EmbeddingStats, NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import (
    FixedPercentageStorageReservation,
    HeuristicalStorageReservation,
)
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType
from torchrec.distributed.types import BoundsCheckMode

from dynamicemb import (
    ConfigError,
    DynamicEmbInitializerArgs,
    DynamicEmbInitializerMode,
    DynamicEmbTableOptions,
    DynamicEmbWarning,
)
from dynamicemb.planner import (
    DynamicEmbeddingEnumerator,
    DynamicEmbeddingShardingPlanner,
    DynamicEmbParameterSharding,
)
from dynamicemb.planner import planner as planner_module
from dynamicemb.planner.capacity import resolve_options
from dynamicemb.planner.stats import dynamic_table_rows, format_bytes
from dynamicemb.table.memory import Memory
from tests.planner.models import BATCH_SIZE, GIB, Model, collection, config, dynamic, sharders, topology


def planner(constraints=None, world_size=2, **arguments):
    arguments.setdefault("topology", topology(world_size))
    arguments.setdefault("batch_size", BATCH_SIZE)
    return DynamicEmbeddingShardingPlanner(constraints=constraints, **arguments)


@pytest.fixture
def gpu_pretended(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_entries_of_a_plan(world_size):
    options = DynamicEmbTableOptions(seed=3)
    constraints = {"item": dynamic(options), "tag": dynamic(), "user": ParameterConstraints()}
    before = copy.deepcopy(constraints)
    model = Model(bags=True)
    plan = planner(constraints, world_size).plan(model, sharders()).plan
    assert constraints == before
    assert {path: sorted(tables) for path, tables in plan.items()} == {
        "wide": ["country", "item", "user"], "narrow": ["tag"], "bags": ["bag"],
    }  # fmt: skip
    for path, name, given in (("wide", "item", options), ("narrow", "tag", None)):
        sharding = plan[path][name]
        assert isinstance(sharding, DynamicEmbParameterSharding)
        assert (sharding.sharding_type, sharding.compute_kernel) == ("row_wise", "customized_kernel")
        assert sharding.ranks == list(range(world_size))
        (table,) = [entry for entry in getattr(model, path).embedding_configs() if entry.name == name]
        assert sharding.dynamicemb_options == resolve_options(name, table, given, world_size)
        assert pickle.loads(pickle.dumps(sharding)) == sharding
    for path, name in (("wide", "user"), ("wide", "country"), ("bags", "bag")):
        assert not isinstance(plan[path][name], DynamicEmbParameterSharding)
        assert plan[path][name].compute_kernel in ("fused", "dense")


def test_a_plan_without_dynamic_tables_is_torchrec_s():
    expected = EmbeddingShardingPlanner(topology=topology(), batch_size=BATCH_SIZE).plan(Model(bags=True), sharders())
    assert planner().plan(Model(bags=True), sharders()).plan == expected.plan
    plain = EmbeddingEnumerator(topology(), BATCH_SIZE)
    assert planner(enumerator=plain).plan(Model(bags=True), sharders()).plan == expected.plan


def test_a_plan_for_gpus(gpu_pretended):
    model = Model()
    plan = planner({"item": dynamic()}, topology=topology(2, "cuda")).plan(model, sharders()).plan
    shards = plan["wide"]["item"].sharding_spec.shards
    assert [str(shard.placement) for shard in shards] == ["rank:0/cuda:0", "rank:1/cuda:1"]


def test_root_collection_and_same_name_in_two_collections():
    plan = planner({"item": dynamic()}).plan(collection(config("item")), sharders()).plan
    assert plan[""]["item"].dynamicemb_options.dim == 16
    model = Model()
    model.second = collection(config("item", num_embeddings=50, dim=32))
    plan = planner({"item": dynamic()}).plan(model, sharders()).plan
    assert (plan["wide"]["item"].dynamicemb_options.dim, plan["second"]["item"].dynamicemb_options.dim) == (16, 32)


def test_constraints_of_the_enumerator_are_the_planner_s():
    constraints = {"item": dynamic()}
    enumerator = DynamicEmbeddingEnumerator(topology(), BATCH_SIZE, constraints)
    for given in (None, constraints, copy.deepcopy(constraints)):
        plan = planner(given, enumerator=enumerator).plan(Model(), sharders()).plan
        assert isinstance(plan["wide"]["item"], DynamicEmbParameterSharding)


def test_plan_context_can_be_hashed():
    def context_hash(options):
        one = planner({"item": dynamic(options)})
        one.plan(Model(), sharders())
        return one.hash_planner_context_inputs()

    assert context_hash(None) == context_hash(None)
    assert context_hash(DynamicEmbTableOptions(seed=1)) != context_hash(DynamicEmbTableOptions(seed=2))


@pytest.mark.parametrize(
    "reserve",
    [lambda: None, lambda: HeuristicalStorageReservation(0.1), lambda: FixedPercentageStorageReservation(0.1)],
)
def test_a_plan_that_cannot_fit_on_hosts(reserve):
    place = topology(2, ddr_cap=2 * 10**6)
    constraints = {"item": dynamic(DynamicEmbTableOptions(max_capacity=10**6)), "tag": dynamic()}
    with pytest.raises(PlannerError) as caught:
        planner(constraints, topology=place, storage_reservation=reserve()).plan(Model(), sharders())
    assert caught.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    message = str(caught.value)
    slots = 7813 * 128
    assert f"'item': {slots * (17 + 64)} bytes on each of 2 ranks ({slots} rows of 64 bytes" in message
    assert f"'tag': {512 * (17 + 32)} bytes on each of 2 ranks" in message
    assert f"Dynamic tables take {slots * 81 + 512 * 49} bytes" in message
    assert "Possible solutions" in message  # torchrec's own part
    assert message.index("'item': ") < message.index("'tag': ")


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 2 MiB."""
    monkeypatch.setattr(planner_module, "memory_of", lambda device: Memory(2 * 2**20, 2**20))


@pytest.mark.parametrize("ranks_on_machine", [1, 2])
def test_memory_of_this_machine_is_the_budget_on_a_cpu(small_machine, ranks_on_machine):
    place = Topology(world_size=2, local_world_size=ranks_on_machine, compute_device="cpu")
    before = copy.deepcopy(place)
    # 512 rows of 81 bytes each way fit; 13,000 rows, 1 MiB on each of two ranks, only if a rank has it all.
    planner({"item": dynamic()}, topology=place).plan(Model(), sharders())
    large = planner({"item": dynamic(DynamicEmbTableOptions(max_capacity=13_000))}, topology=place)
    if ranks_on_machine == 1:
        large.plan(Model(), sharders())
    else:
        with pytest.raises(PlannerError, match=r"This machine has 1 MiB for each of its 2 ranks; .*ddr_cap") as caught:
            large.plan(Model(), sharders())
        assert caught.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
        assert "'item': 1057536 bytes on each of 2 ranks" in str(caught.value)
    assert repr(place) == repr(before), "the user's topology is not modified"


def test_a_given_ddr_cap_is_the_budget(small_machine):
    constraints = {"item": dynamic(DynamicEmbTableOptions(max_capacity=100_000))}
    planner(constraints, topology=topology(2, ddr_cap=100 * 2**20)).plan(Model(), sharders())
    with pytest.raises(PlannerError) as caught:
        planner(constraints, topology=topology(2, ddr_cap=2**20)).plan(Model(), sharders())
    assert "This machine" not in str(caught.value)


def test_a_table_that_this_machine_cannot_hold():
    """Without a fixture: 10^12 rows of 64 bytes."""
    with pytest.raises(PlannerError, match=r"'item': .* bytes on each of 2 ranks") as caught:
        planner({"item": dynamic()}).plan(collection(config("item", num_embeddings=10**12)), sharders())
    assert "This machine has" in str(caught.value)


def test_a_plan_that_cannot_fit_on_gpus(gpu_pretended):
    place = topology(2, "cuda", hbm_cap=GIB)
    model = collection(config("item", num_embeddings=10**8, dim=64))
    with pytest.raises(PlannerError, match=r"'item': \d+ bytes on each of 2 ranks") as caught:
        planner({"item": dynamic()}, topology=place).plan(model, sharders())
    assert caught.value.error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    # 10^6 rows with Adam, 17 + 256 + 512 bytes each: 374 MiB on each of two ranks.
    fitting = collection(config("item", num_embeddings=10**6, dim=64))
    planner({"item": dynamic()}, topology=place).plan(fitting, sharders({"optimizer": "adam"}))


def test_the_budget_has_no_slack():
    """A plan fits in exactly the bytes of the table and torchrec's buffers, and not in one less."""
    needed = 512 * 81 + BATCH_SIZE * 72
    arguments = {"storage_reservation": FixedPercentageStorageReservation(0.0)}
    model = collection(config("item"))
    planner({"item": dynamic()}, topology=topology(2, ddr_cap=needed), **arguments).plan(model, sharders())
    with pytest.raises(PlannerError):
        planner({"item": dynamic()}, topology=topology(2, ddr_cap=needed - 1), **arguments).plan(model, sharders())


def test_errors_of_static_plans_stay_torchrec_s():
    place = topology(2, ddr_cap=1000)
    with pytest.raises(PlannerError) as expected:
        EmbeddingShardingPlanner(topology=place, batch_size=BATCH_SIZE).plan(Model(), sharders())
    with pytest.raises(PlannerError) as caught:
        planner(topology=place).plan(Model(), sharders())
    assert str(caught.value) == str(expected.value)
    assert caught.value.error_type is expected.value.error_type


@pytest.mark.parametrize("debug", [True, False])
def test_printed_plan(caplog, debug):
    with caplog.at_level(logging.INFO, logger=EmbeddingStats.__module__):
        constraints = {"item": dynamic(), "tag": dynamic(DynamicEmbTableOptions(init_capacity=100))}
        planner(constraints, debug=debug).plan(Model(), sharders({"optimizer": "adam"}))
    lines = caplog.text.splitlines()
    assert any("customized_kernel: 2" in line for line in lines)
    for fqn, rows, total in (("wide.item", "512        512", "104 KiB"), ("narrow.tag", "512        128", "56.5 KiB")):
        of_torchrec = [line for line in lines if fqn in line and "customized_kernel" in line]
        ours = [line for line in lines if fqn in line and "adam" in line]
        assert len(of_torchrec) == len(ours) == (1 if debug else 0)
        assert all(rows in line and total in line and "8.5 KiB" in line for line in ours)
    assert any("wide.user" in line for line in lines) == debug


def test_printed_plan_without_dynamic_tables_is_torchrec_s(caplog):
    with caplog.at_level(logging.INFO, logger=EmbeddingStats.__module__):
        planner().plan(Model(), sharders())
    assert "Dynamic Tables" not in caplog.text
    assert "wide.item" in caplog.text
    assert dynamic_table_rows([]) == []


def test_given_stats_are_used(caplog):
    with caplog.at_level(logging.INFO, logger=EmbeddingStats.__module__):
        planner({"item": dynamic()}, stats=NoopEmbeddingStats()).plan(Model(), sharders())
    assert "wide.item" not in caplog.text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (10**6, "977 KiB"), (64 * GIB, "64 GiB"), (2**53, "8192 TiB")],
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_no_gpu_for_a_gpu_plan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"compute_device is 'cuda'.* no GPU .*'item'.* compute_device='cpu'"):
        planner({"item": dynamic()}, topology=topology(2, "cuda"))


def test_plain_enumerator_with_dynamic_tables():
    plain = EmbeddingEnumerator(topology(), BATCH_SIZE)
    with pytest.raises(
        ConfigError, match=r"enumerator is of type EmbeddingEnumerator.*'item'; use DynamicEmbeddingEnumerator"
    ):
        planner({"item": dynamic(), "user": ParameterConstraints()}, enumerator=plain)


@pytest.mark.parametrize(
    ("of_planner", "of_enumerator", "named"),
    [
        ({"item": dynamic()}, None, "'item'"),
        ({"item": dynamic()}, {"item": dynamic(), "user": dynamic()}, "'user'"),
        ({"item": dynamic()}, {"item": dynamic(DynamicEmbTableOptions(seed=1))}, "'item'"),
        ({}, {"user": dynamic()}, "'user'"),
    ],
)
def test_constraints_that_disagree(of_planner, of_enumerator, named):
    enumerator = DynamicEmbeddingEnumerator(topology(), BATCH_SIZE, of_enumerator)
    with pytest.raises(ConfigError, match=f"disagree about the dynamic tables {named}; pass the same"):
        planner(of_planner, enumerator=enumerator)


def test_topologies_that_disagree():
    enumerator = DynamicEmbeddingEnumerator(topology(3), BATCH_SIZE, {"item": dynamic()})
    with pytest.raises(ConfigError, match=r"world_size=2, .*world_size=3; use one topology"):
        planner(enumerator=enumerator)


def test_eb_configs():
    model = Model()
    good = copy.deepcopy(model.wide.embedding_configs())
    planner({"item": dynamic()}, eb_configs=good).plan(model, sharders())
    with pytest.raises(ConfigError, match="eb_configs: table 'item' has num_embeddings=5, but the model's is 1000"):
        planner({"item": dynamic()}, eb_configs=[config("item", 5)]).plan(model, sharders())
    with pytest.raises(ConfigError, match=r"eb_configs is a Topology.* topology=\.\.\. by name"):
        DynamicEmbeddingShardingPlanner(topology())
    with pytest.raises(ConfigError, match="eb_configs holds a str"):
        planner(eb_configs=["item"])


def test_unknown_table_is_found_before_memory():
    place = topology(2, ddr_cap=1000)
    with pytest.raises(ConfigError, match=r"'itm' \(did you mean 'item'\?\)"):
        planner({"itm": dynamic()}, topology=place).plan(Model(), sharders())


@pytest.mark.parametrize(
    "init_fn", [torch.nn.init.zeros_, functools.partial(torch.nn.init.uniform_, a=-5.0, b=5.0), lambda rows: None]
)
def test_init_fn_of_a_config_warns(init_fn):
    model = collection(config("item", init_fn=init_fn), config("user", weight_init_max=0.5))
    with pytest.warns(DynamicEmbWarning, match="init_fn of its config has no effect") as record:
        planner({"item": dynamic(), "user": dynamic()}).plan(model, sharders())
    (message,) = [str(entry.message) for entry in record if entry.category is DynamicEmbWarning]
    assert message.startswith("table 'item'")


def test_constraints_without_effect_warn():
    unused = {"enforce_hbm": True, "bounds_check_mode": BoundsCheckMode.NONE, "min_partition": 8}
    with pytest.warns(DynamicEmbWarning, match="'item': min_partition, enforce_hbm, bounds_check_mode of its constr"):
        planner({"item": dynamic(**unused)}).plan(Model(), sharders())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DynamicEmbWarning)
        planner({"item": dynamic(pooling_factors=[2.0, 1.0]), "user": ParameterConstraints(**unused)}).plan(
            Model(), sharders()
        )


def test_numbers_that_an_initializer_does_not_look_at_warn():
    modes = DynamicEmbInitializerMode
    forgotten = DynamicEmbTableOptions(
        initializer_args=DynamicEmbInitializerArgs(value=0.5, mean=1.0),  # the mode is UNIFORM
        eval_initializer_args=DynamicEmbInitializerArgs(modes.CONSTANT, lower=-1.0, value=2.0),
    )
    with pytest.warns(DynamicEmbWarning, match="of its") as record:
        planner({"item": dynamic(forgotten)}).plan(Model(), sharders())
    messages = sorted(str(entry.message) for entry in record if entry.category is DynamicEmbWarning)
    assert messages[0].startswith("table 'item': lower of its eval_initializer_args have no effect with mode CONSTANT;")
    assert messages[1].startswith("table 'item': mean, value of its initializer_args have no effect with mode UNIFORM;")
    assert len(messages) == 2
    given = [
        DynamicEmbInitializerArgs(modes.NORMAL, mean=1.0, std_dev=2.0),
        DynamicEmbInitializerArgs(modes.TRUNCATED_NORMAL, mean=1.0, std_dev=2.0, lower=0.0, upper=3.0),
        DynamicEmbInitializerArgs(modes.UNIFORM, lower=-1.0, upper=1.0),
        DynamicEmbInitializerArgs(modes.CONSTANT, value=3.0),
        DynamicEmbInitializerArgs(modes.DEBUG),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DynamicEmbWarning)
        for initializer in given:
            options = DynamicEmbTableOptions(initializer_args=initializer, eval_initializer_args=initializer)
            planner({"item": dynamic(options)}).plan(Model(), sharders())
