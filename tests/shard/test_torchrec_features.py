"""What torchrec offers for its own tables: it works on dynamic ones, or is refused by name."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_tracker.types import DeltaTrackerConfig, TrackingMode
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dynamicemb import ConfigError
from tests import tolerances
from tests.distributed import run_on_ranks
from tests.shard.models import STATIC, ZEROS, distribute, dynamic, evaluated, features_of, table

BATCH = {"a": [[1, 2], []], "b": [[2, 3], [4]]}
IDS = {"a": torch.arange(4), "b": torch.arange(4)}


class Model(nn.Module):
    def __init__(self, *tables: EmbeddingConfig) -> None:
        super().__init__()
        self.embeddings = EmbeddingCollection(tables=list(tables), device=torch.device("meta"))
        self.dense = nn.Linear(8, 1)
        nn.init.constant_(self.dense.weight, 0.5)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.dense(torch.cat([jagged.values() for jagged in self.embeddings(features).values()])).sum()


def build(plain: bool = False) -> nn.Module:
    options = STATIC if plain else dynamic(initializer_args=ZEROS, max_capacity=512)
    return distribute(
        Model(table("a"), table("b")), dict.fromkeys(IDS, options), (torch.optim.SGD, {"lr": 1.0}), plain=plain
    )


# ------------------------------------------------------------------------------------------- trackers


def track(rank: int, world_size: int) -> list[str]:
    messages, model = [], build()
    for mode in TrackingMode:
        for auto_compact in (False, True):
            with pytest.raises(ConfigError) as error:
                model.init_torchrec_delta_tracker(DeltaTrackerConfig(tracking_mode=mode, auto_compact=auto_compact))
            messages.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        model.module.embeddings.register_post_lookup_tracker_fn(print)
    messages.append(str(error.value))
    model(features_of(BATCH)).backward()  # nothing of it is left behind
    skipping = DeltaTrackerConfig(fqns_to_skip=["embeddings"])
    model.init_torchrec_delta_tracker(skipping)
    model(features_of(BATCH)).backward()
    static = distribute(Model(table("a")), {"a": STATIC}, (torch.optim.SGD, {"lr": 1.0}))
    tracker = static.init_torchrec_delta_tracker(DeltaTrackerConfig())
    static(features_of({"a": [[3, 5], [3]]})).backward()
    assert [ids.tolist() for ids in tracker.get_unique_ids().values()] == [[3, 5]]
    return messages


def test_delta_trackers_are_refused() -> None:
    [messages] = run_on_ranks(1, track)
    assert len(messages) == 2 * len(TrackingMode) + 1
    assert all("a, b" in message and "incremental_dump" in message for message in messages)


# ------------------------------------------------------------------------------------------- other kinds of tables


@pytest.mark.parametrize("field", ["enable_embedding_update", "use_virtual_table", "stash_weights"])
def test_other_kinds_of_tables_are_refused(field: str) -> None:
    run_on_ranks(1, _other_kind, field)


def _other_kind(rank: int, world_size: int, field: str) -> None:
    config = EmbeddingConfig(name="a", num_embeddings=100, embedding_dim=8, feature_names=["a"], **{field: True})
    with pytest.raises(ConfigError, match=f"table 'a': {field}=True .* cannot be combined with use_dynamicemb"):
        distribute(Model(config), {"a": dynamic()}, (torch.optim.SGD, {"lr": 1.0}))


def prefetch_and_flush(rank: int, world_size: int) -> None:
    model = build()
    embeddings = model.module.embeddings
    context = embeddings.create_context()
    keys = embeddings.input_dist(context, features_of(BATCH)).wait().wait()
    embeddings.prefetch(keys, ctx=context)
    embeddings.compute_and_output_dist(context, keys).wait()
    for lookup in embeddings._lookups:
        lookup.flush()
        lookup.purge()
    with pytest.raises(RuntimeError, match="enable_embedding_update"):
        model.write(features_of(BATCH))


def test_prefetch() -> None:
    run_on_ranks(1, prefetch_and_flush)


# ------------------------------------------------------------------------------------------- clipping


def clipped(rank: int, world_size: int, plain: bool) -> list[dict[str, Any]]:
    """One training run through every way to clip. Returns norm, dense bias and rows after each of them."""
    model = build(plain)
    if plain:
        for key, value in model.state_dict().items():
            for shard in value.local_shards() if "embeddings" in key else ():
                shard.tensor.zero_()
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    wrapped = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    combined = CombinedOptimizer([("fused", model.fused_optimizer), ("dense", wrapped)])
    of_groups = {parameter: [dist.group.WORLD] for parameter in model.module.embeddings.parameters()}
    results = []
    for clipping, norm_type, groups_by_parameter, fused_only in itertools.product(
        GradientClipping, (2.0, "inf"), (None, of_groups), (False, True)
    ):
        if plain and fused_only and clipping is GradientClipping.VALUE:
            clipping = GradientClipping.NONE  # torch fails where there are no gradients at all
        optimizer = GradientClippingOptimizer(
            model.fused_optimizer if fused_only else combined,
            clipping=clipping, max_gradient=0.01, norm_type=norm_type, track_grad_norm=not fused_only,
            enable_global_grad_clip=groups_by_parameter is not None, param_to_pgs=groups_by_parameter,
        )  # fmt: skip
        combined.zero_grad()
        model(features_of(BATCH)).backward()
        optimizer.step()
        norm = None if fused_only else float(optimizer.last_total_grad_norm)
        rows = evaluated(model.module.embeddings, IDS)
        results.append({"norm": norm, "bias": float(model.module.dense.bias), **rows})
    return results


@pytest.mark.skipif(
    "track_grad_norm" not in inspect.signature(GradientClippingOptimizer).parameters,
    reason="torchrec before 1.8 does not say the norm of gradients",
)
def test_clipping_as_with_torchrec_tables() -> None:
    """Dense gradients are clipped alike, and rows, which are updated in the backward pass, never are."""
    ours, theirs = (run_on_ranks(2, clipped, plain) for plain in (False, True))
    for own, reference in zip(ours, theirs):
        assert len(own) == len(reference) == 24
        for one, other in zip(own, reference):
            assert one["norm"] == (None if other["norm"] is None else pytest.approx(other["norm"], rel=1e-5))
            assert one["bias"] == pytest.approx(other["bias"], rel=1e-5)
            assert all(torch.allclose(one[name], other[name], rtol=tolerances.TRAINED_ROW_RTOL) for name in IDS)
        assert own[-1]["a"][1, 0] != 0 and own[-1]["bias"] != own[0]["bias"]
