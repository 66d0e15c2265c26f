"""Finding tables in a model, and every way in which a constraint can be at odds with it."""

import copy

import pytest
import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from dynamicemb import ConfigError, DynamicEmbTableOptions
from dynamicemb.kernels.layout import OptimizerKind
from dynamicemb.planner.tables import check_eb_configs, dynamic_tables, table_sites
from tests.planner.models import Model, collection, config, dynamic, sharders


def tables_of(model, constraints, world_size=2, chosen=None):
    return dynamic_tables(table_sites(model, sharders() if chosen is None else chosen), constraints, world_size)


def test_sites_of_a_model():
    sites = table_sites(Model(bags=True), sharders())
    assert sorted((site.path, site.name) for site in sites) == [
        ("bags", "bag"), ("narrow", "tag"), ("wide", "country"), ("wide", "item"), ("wide", "user"),
    ]  # fmt: skip
    assert all(site.param is not None and site.sharder is not None for site in sites)
    (site,) = table_sites(collection(config("item")), sharders())
    assert (site.path, site.name) == ("", "item")
    assert table_sites(nn.Linear(2, 2), sharders()) == []


def test_only_flagged_tables_are_dynamic():
    constraints = {"item": dynamic(), "tag": dynamic(DynamicEmbTableOptions(seed=5)), "user": ParameterConstraints()}
    tables = tables_of(Model(), constraints)
    assert sorted(tables) == [("narrow", "tag"), ("wide", "item")]
    assert tables["narrow", "tag"].options.seed == 5
    assert tables["wide", "item"].fqn == "wide.item"
    assert tables_of(Model(), None) == {}


def test_unknown_tables_are_found_before_anything_else():
    constraints = {"itme": dynamic(sharding_types=["table_wise"]), "zzz": ParameterConstraints(), "user": dynamic()}
    with pytest.raises(ConfigError) as caught:
        tables_of(Model(), constraints)
    message = str(caught.value)
    assert "'itme' (did you mean 'item'?)" in message
    assert "'zzz'" in message
    for name in ("item", "user", "country", "tag"):
        assert f"'{name}'" in message


def test_long_lists_of_tables_are_cut():
    model = collection(*(config(f"table_{index}") for index in range(70)))
    with pytest.raises(ConfigError, match=r"'table_49' and 20 more"):
        tables_of(model, {"other": dynamic()})
    with pytest.raises(ConfigError, match="its tables are none"):
        tables_of(nn.Linear(2, 2), {"other": dynamic()})


def test_pooled_bags_are_refused():
    with pytest.raises(
        ConfigError, match="table 'bag': its module 'bags' is of type EmbeddingBagCollection, and pooled bags"
    ):
        tables_of(Model(bags=True), {"bag": dynamic()})


def test_collection_without_a_sharder():
    with pytest.raises(ConfigError, match=r"table 'item': its module 'wide' .*DynamicEmbeddingCollectionSharder"):
        tables_of(Model(), {"item": dynamic()}, chosen=[EmbeddingBagCollectionSharder()])
    # A static table there is torchrec's business.
    assert tables_of(Model(), {"item": ParameterConstraints()}, chosen=[]) == {}


def test_a_config_that_enables_writes_is_refused():
    model = collection(config("item", enable_embedding_update=True))
    with pytest.raises(ConfigError, match="table 'item': enable_embedding_update=True"):
        tables_of(model, {"item": dynamic()})
    assert tables_of(model, {"item": ParameterConstraints()}) == {}


def test_virtual_table_config_is_refused():
    model = collection(config("item", use_virtual_table=True, total_num_buckets=4))
    with pytest.raises(ConfigError, match="table 'item': use_virtual_table=True"):
        tables_of(model, {"item": dynamic()})


def test_options_are_checked_against_the_model():
    with pytest.raises(ConfigError, match=r"table 'item': embedding_dim=30 .* use 32"):
        tables_of(collection(config("item", dim=30)), {"item": dynamic()})
    with pytest.raises(ConfigError, match="table 'item': sharding_types"):
        tables_of(Model(), {"item": dynamic(sharding_types=["column_wise"])})


@pytest.mark.parametrize(
    ("fused_params", "kind"),
    [
        (None, OptimizerKind.SGD),
        ({"optimizer": "exact_sgd", "learning_rate": 0.1}, OptimizerKind.SGD),
        ({"optimizer": "adam", "learning_rate": 0.1}, OptimizerKind.ADAM),
        ({"optimizer": "exact_adagrad"}, OptimizerKind.ADAGRAD),
    ],
)
def test_optimizer_of_the_sharder(fused_params, kind):
    given = copy.deepcopy(fused_params)
    tables = tables_of(Model(), {"item": dynamic()}, chosen=sharders(fused_params))
    assert tables["wide", "item"].layout.optimizer is kind
    assert fused_params == given


def test_optimizer_of_the_parameter_wins_and_is_not_modified():
    model = Model()
    kwargs = {"lr": 0.02, "eps": 1e-6}
    apply_optimizer_in_backward(RowWiseAdagrad, model.wide.embeddings["item"].parameters(), kwargs)
    (parameter,) = model.wide.embeddings["item"].parameters()
    before = copy.deepcopy(parameter._optimizer_kwargs)
    chosen = sharders({"optimizer": "adam", "learning_rate": 0.1, "beta1": 0.8})
    tables = tables_of(model, {"item": dynamic(), "user": dynamic()}, chosen=chosen)
    assert tables["wide", "item"].layout.optimizer is OptimizerKind.ROWWISE_ADAGRAD
    assert tables["wide", "user"].layout.optimizer is OptimizerKind.ADAM
    assert parameter._optimizer_kwargs == before
    assert kwargs == {"lr": 0.02, "eps": 1e-6}


def test_unknown_optimizers():
    with pytest.raises(ConfigError, match="table 'item': optimizer lars_sgd is not supported"):
        tables_of(Model(), {"item": dynamic()}, chosen=sharders({"optimizer": "lars_sgd"}))
    model = Model()
    apply_optimizer_in_backward(torch.optim.RMSprop, model.wide.embeddings["item"].parameters(), {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"table 'item': optimizer RMSprop is not supported .* use SGD"):
        tables_of(model, {"item": dynamic()})
    apply_optimizer_in_backward(torch.optim.SGD, model.wide.embeddings["item"].parameters(), {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"table 'item': it has 2 optimizers .*RMSprop, SGD"):
        tables_of(model, {"item": dynamic()})


def test_bytes_of_a_table():
    options = DynamicEmbTableOptions(bucket_capacity=16, embedding_dtype=torch.float16)
    tables = tables_of(
        collection(config("item", 100, dim=12)), {"item": dynamic(options)}, chosen=sharders({"optimizer": "adam"})
    )
    table = tables["", "item"]
    # 50 rows on each of two ranks -> 4 buckets; 12 * 2 bytes padded to 32, and 2 * 12 * 4 bytes of Adam.
    assert table.slots == 64
    assert table.metadata_bytes == 64 * (1 + 8 + 8)
    assert table.row_bytes == 64 * (32 + 96)
    assert table.total_bytes == 64 * 145


def test_eb_configs_that_agree():
    model = Model()
    sites = table_sites(model, sharders())
    check_eb_configs(copy.deepcopy([*model.wide.embedding_configs(), *model.narrow.embedding_configs()]), sites)
    check_eb_configs([config("tag", dim=8)], sites)
    check_eb_configs([], sites)


def test_eb_configs_of_tables_of_one_name():
    """Collections may each have a table of that name: a config is that of one of them."""
    model = nn.ModuleList([collection(config("tag", dim=8)), collection(config("tag", dim=16))])
    sites = table_sites(model, sharders())
    check_eb_configs([config("tag", dim=8)], sites)
    check_eb_configs([config("tag", dim=16)], sites)
    with pytest.raises(ConfigError, match="table 'tag' has embedding_dim=4, but the model's is 8"):
        check_eb_configs([config("tag", dim=4)], sites)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config("tags", dim=8), "table 'tags' is not in the model, whose tables are .*'tag'"),
        (config("tag", 999, dim=8), "table 'tag' has num_embeddings=999, but the model's is 1000"),
        (config("tag", dim=16), "table 'tag' has embedding_dim=16, but the model's is 8"),
        (config("tag", dim=8, data_type=DataType.FP16), "table 'tag' has data_type=.* but the model's is"),
        (config("tag", dim=8, feature_names=["x"]), r"table 'tag' has feature_names=\['x'\], but .*\['tag_feature'\]"),
    ],
)
def test_eb_configs_that_disagree(given, message):
    with pytest.raises(ConfigError, match=rf"eb_configs: {message}.*leave eb_configs out"):
        check_eb_configs([given], table_sites(Model(), sharders()))
