"""Options of the enumerator: one for each dynamic table with its memory, torchrec's own for static ones."""

import copy

import pytest
import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ParameterConstraints, ShardEstimator, Storage

from dynamicemb import ConfigError, DynamicEmbTableOptions
from dynamicemb.planner import DynamicEmbeddingEnumerator
from tests.planner.models import BATCH_SIZE, Model, collection, config, dynamic, sharders, topology


class OfferingEverything(EmbeddingCollectionSharder):
    """A sharder that would let static tables use the customized kernel too."""

    def compute_kernels(self, sharding_type, compute_device_type):
        return [*super().compute_kernels(sharding_type, compute_device_type), "customized_kernel"]


def enumerate_model(model, constraints, world_size=2, device="cpu", chosen=None, **arguments):
    enumerator = DynamicEmbeddingEnumerator(topology(world_size, device), BATCH_SIZE, constraints, **arguments)
    return enumerator, enumerator.enumerate(model, sharders() if chosen is None else chosen)


def described(options):
    return sorted(
        (
            option.fqn, option.sharding_type, option.compute_kernel, option.partition_by, option.is_pooled,
            tuple((tuple(s.size), tuple(s.offset), s.storage, s.perf) for s in option.shards),
        )
        for option in options
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "fields", [{}, {"sharding_types": ["row_wise", "table_wise"]}, {"compute_kernels": ["fused", "customized_kernel"]}]
)
def test_exactly_one_option_for_a_dynamic_table(world_size, fields):
    _, options = enumerate_model(Model(), {"item": dynamic(**fields)}, world_size)
    (option,) = [option for option in options if option.name == "item"]
    assert (option.sharding_type, option.compute_kernel) == ("row_wise", "customized_kernel")
    assert option.partition_by == "uniform"
    assert option.num_shards == world_size
    assert not option.is_pooled


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_static_tables_are_torchrec_s(world_size, device):
    shared = {"user": ParameterConstraints(sharding_types=["row_wise", "column_wise"], pooling_factors=[3.0])}
    own = EmbeddingEnumerator(topology(world_size, device), BATCH_SIZE, shared)
    expected = described(own.enumerate(Model(bags=True), sharders()))
    _, options = enumerate_model(Model(bags=True), shared, world_size, device)
    assert described(options) == expected
    _, options = enumerate_model(Model(bags=True), {**shared, "item": dynamic()}, world_size, device)
    static = [option for option in options if option.name != "item"]
    assert described(static) == [entry for entry in expected if entry[0] != "wide.item"]


def test_static_tables_never_get_the_customized_kernel():
    constraints = {"item": dynamic(), "user": ParameterConstraints(compute_kernels=["fused", "customized_kernel"])}
    _, options = enumerate_model(Model(), constraints, chosen=[OfferingEverything()])
    assert {option.name for option in options if option.compute_kernel == "customized_kernel"} == {"item"}
    assert {option.name for option in options} == {"item", "user", "country", "tag"}


@pytest.mark.parametrize(
    ("world_size", "slots_on_rank"),
    [(1, 1024), (2, 512), (3, 384)],
)
@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [("exact_sgd", 0), ("exact_adagrad", 64), ("exact_row_wise_adagrad", 16), ("adam", 128)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_by_independent_arithmetic(world_size, slots_on_rank, optimizer, state_bytes, device):
    """1000 rows of 16 float32: keys, scores and digests, rows, optimizer state, and torchrec's buffers."""
    _, options = enumerate_model(
        Model(), {"item": dynamic()}, world_size, device, chosen=sharders({"optimizer": optimizer})
    )
    (option,) = [option for option in options if option.name == "item"]
    table_bytes = slots_on_rank * (8 + 8 + 1 + 16 * 4 + state_bytes)
    buffer_bytes = BATCH_SIZE * 8 + BATCH_SIZE * 16 * 4  # one id a sample, and its row
    expected = table_bytes + buffer_bytes
    assert len(option.shards) == world_size
    for shard in option.shards:
        assert shard.storage == (Storage(hbm=0, ddr=expected) if device == "cpu" else Storage(hbm=expected, ddr=0))
        assert shard.perf.total > 0


def test_buffers_follow_pooling_factors_and_batch_sizes():
    constraints = {"item": dynamic(pooling_factors=[10.0, 3.0], batch_sizes=[8, 64], num_poolings=[1.0, 2.0])}
    _, options = enumerate_model(Model(), constraints)
    (option,) = [option for option in options if option.name == "item"]
    ids = 10 * 8 + 3 * 64 * 2
    assert option.shards[0].storage.ddr == 512 * (17 + 64) + ids * (8 + 64)


def test_more_ranks_than_rows():
    _, options = enumerate_model(collection(config("item", num_embeddings=2)), {"item": dynamic()}, world_size=3)
    (option,) = options
    assert [shard.storage.ddr for shard in option.shards] == [128 * 81 + BATCH_SIZE * 72] * 3


def test_half_precision_rows_and_given_capacity():
    table = DynamicEmbTableOptions(embedding_dtype=torch.float16, max_capacity=1000, bucket_capacity=64)
    _, options = enumerate_model(
        Model(), {"item": dynamic(table)}, chosen=sharders({"optimizer": "exact_row_wise_adagrad"})
    )
    (option,) = [option for option in options if option.name == "item"]
    assert option.shards[0].storage.ddr == 1024 * (17 + 32 + 16) + BATCH_SIZE * 72


def test_dynamic_lookups_cost_more_than_static_ones():
    _, options = enumerate_model(
        Model(), {"item": dynamic(), "user": ParameterConstraints(sharding_types=["row_wise"])}
    )
    perf = {option.name: option.shards[0].perf for option in options if option.sharding_type == "row_wise"}
    # A bucket of 128 digests, a key and a score read and written, beside an id and two rows.
    assert perf["item"].fwd_compute == pytest.approx(perf["user"].fwd_compute * (1 + (128 + 24) / (8 + 128)))
    assert perf["item"].bwd_compute == perf["user"].bwd_compute
    assert perf["item"].fwd_comms == perf["user"].fwd_comms


def test_user_s_estimators_are_asked():
    class Constant(ShardEstimator):
        def __init__(self, topology=None, constraints=None):
            pass

        def estimate(self, sharding_options, *args, **kwargs):
            assert all(option.compute_kernel == "fused" for option in sharding_options if option.name == "item")
            for option in sharding_options:
                for shard in option.shards:
                    shard.storage = Storage(hbm=0, ddr=64 + 5)

    place = topology()
    perf = EmbeddingPerfEstimator(place)
    _, options = enumerate_model(Model(), {"item": dynamic()}, estimator=[perf, Constant()])
    (option,) = [option for option in options if option.name == "item"]
    assert [shard.storage.ddr for shard in option.shards] == [512 * 81 + 5] * 2
    _, options = enumerate_model(Model(), {"item": dynamic()}, estimator=[perf, EmbeddingStorageEstimator(place)])
    (option,) = [option for option in options if option.name == "item"]
    assert option.shards[0].storage.ddr == 512 * 81 + BATCH_SIZE * 72


def test_only_the_topology_must_be_given():
    plain = EmbeddingEnumerator(topology(), batch_size=512).enumerate(Model(), sharders())
    for enumerator in (DynamicEmbeddingEnumerator(topology()), DynamicEmbeddingEnumerator(topology(), None, {})):
        assert described(enumerator.enumerate(Model(), sharders())) == described(plain), "512 is torchrec's default"
    by_position = DynamicEmbeddingEnumerator(topology(), 7, {"item": dynamic()}, EmbeddingPerfEstimator(topology()))
    assert {option.batch_size for option in by_position.enumerate(Model(), sharders())} == {7}


def test_constraints_are_not_modified():
    constraints = {"item": dynamic(DynamicEmbTableOptions(seed=1)), "user": dynamic(), "tag": ParameterConstraints()}
    before = copy.deepcopy(constraints)
    enumerator, _ = enumerate_model(Model(), constraints)
    assert constraints == before
    assert enumerator.constraints is constraints
    assert constraints["user"].dynamicemb_options is None


def test_enumerating_again_gives_the_same():
    enumerator, options = enumerate_model(Model(), {"item": dynamic()})
    model = Model()
    again = enumerator.enumerate(model, sharders())
    assert described(again) == described(options)
    chosen = sharders()
    assert described(enumerator.enumerate(model, chosen)) == described(enumerator.enumerate(model, chosen))
    assert list(enumerator.dynamic_tables) == [("wide", "item")]


def test_errors_come_before_torchrec_s():
    with pytest.raises(ConfigError, match="did you mean 'item'"):
        enumerate_model(Model(), {"itm": dynamic()})
    with pytest.raises(ConfigError, match="pooled bags"):
        enumerate_model(Model(bags=True), {"bag": dynamic()})
