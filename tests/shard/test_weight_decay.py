"""Weight decay of dynamic tables beside TorchRec's own, in each mode, for each optimizer that fbgemm has on a CPU."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, Optional

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.optim import RowWiseAdagrad

from dynamicemb import DynamicEmbWarning
from dynamicemb.shard import DynamicEmbeddingCollectionSharder
from tests import tolerances
from tests.distributed import run_on_ranks
from tests.shard.models import NORMAL, STATIC, collection, distribute, dynamic, evaluated, one_sample, rows, table

ROWS, STEPS, RATE, DECAY = 20, 6, 0.25, 0.125
IDS = {"static": torch.arange(ROWS), "dynamic": torch.arange(ROWS)}
MODES = (None, *(mode for mode in WeightDecayMode if mode.value <= 2))
#: By name: the optimizer in the backward pass, the same in fused parameters, and the modes in which it decays.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], EmbOptimType, tuple[Optional[WeightDecayMode], ...]]] = {
    "sgd": (torch.optim.SGD, EmbOptimType.EXACT_SGD, ()),
    "adagrad": (torch.optim.Adagrad, EmbOptimType.EXACT_ADAGRAD, ()),
    "rowwise_adagrad": (
        RowWiseAdagrad, EmbOptimType.EXACT_ROWWISE_ADAGRAD, (WeightDecayMode.L2, WeightDecayMode.DECOUPLE)
    ),
}  # fmt: skip


def model_of(optimizer: str, decay: dict[str, Any], through_fused_params: bool) -> torch.nn.Module:
    in_backward, kind, _ = OPTIMIZERS[optimizer]
    fused_params = {"optimizer": kind, "learning_rate": RATE, **decay} if through_fused_params else None
    return distribute(
        collection(table("static", ROWS), table("dynamic", ROWS)),
        {"static": STATIC, "dynamic": dynamic(max_capacity=512, initializer_args=NORMAL, eval_initializer_args=NORMAL)},
        None if through_fused_params else (in_backward, {"lr": RATE, **decay}),
        DynamicEmbeddingCollectionSharder(fused_params=fused_params),
    )


def trained(model: torch.nn.Module, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """The rows of both tables after steps that begin at the same rows and read the same ids."""
    (state,) = [value for key, value in model.state_dict().items() if key.endswith("static.weight")]
    for shard in state.local_shards():
        first = shard.metadata.shard_offsets[0]
        shard.tensor.copy_(evaluated(model, IDS)["dynamic"][first : first + shard.tensor.shape[0]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, ROWS, (12,), generator=generator)
        factors = torch.rand(12, 8, generator=generator) + 0.5
        read = rows(model, one_sample({"static": ids, "dynamic": ids}))
        sum((factors * (values + 0.1 * values.sin())).sum() for values in read.values()).backward()
    return {name: values.clone() for name, values in evaluated(model, IDS).items()}


def worst_error(after: dict[str, torch.Tensor]) -> float:
    difference = (after["dynamic"] - after["static"]).abs().amax(1)
    return float((difference / after["static"].abs().amax(1)).max())


def each_mode(rank: int, world_size: int, optimizer: str) -> list[tuple[str, float, bool, list[str]]]:
    """For each mode and way to give it: the error, whether the number made a difference, and what was said."""
    results = []
    plain = trained(model_of(optimizer, {}, True))["dynamic"]
    for mode, through_fused_params in itertools.product(MODES, (False, True)):
        if mode is not None and not through_fused_params and optimizer != "rowwise_adagrad":
            continue  # torch's own classes take no mode
        decay = {"weight_decay": DECAY} | ({} if mode is None else {"weight_decay_mode": mode})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            after = trained(model_of(optimizer, decay, through_fused_params))
        said = [str(entry.message) for entry in caught if entry.category is DynamicEmbWarning]
        name = "no mode" if mode is None else mode.name
        results.append((name, worst_error(after), not torch.equal(after["dynamic"], plain), said))
    return results


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_static_and_a_dynamic_table_train_alike(optimizer: str) -> None:
    decaying = {mode.name for mode in OPTIMIZERS[optimizer][2] if mode is not None}
    (results,) = run_on_ranks(1, each_mode, optimizer)
    assert {name for name, *_ in results} == {"no mode", "NONE", "L2", "DECOUPLE"}
    for name, error, decays, said in results:
        assert error < tolerances.TRAINED_ROW_RTOL, (name, error)
        assert decays == (name in decaying), name
        about = [text for text in said if "weight_decay" in text]
        assert len(about) == (name not in decaying) and all("table 'dynamic'" in text for text in about), (name, said)


def adam(rank: int, world_size: int) -> list[tuple[str, torch.Tensor, list[str]]]:
    results = []
    options = dynamic(max_capacity=512, initializer_args=NORMAL, eval_initializer_args=NORMAL)
    for mode in MODES:
        params = {"optimizer": EmbOptimType.ADAM, "learning_rate": RATE, "weight_decay": DECAY}
        params |= {} if mode is None else {"weight_decay_mode": mode}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = distribute(
                collection(table("item")), {"item": options}, None, DynamicEmbeddingCollectionSharder(params)
            )
        before = evaluated(model, {"item": torch.arange(4)})["item"].clone()
        for _ in range(3):
            rows(model, one_sample({"item": torch.arange(4)}))["item"].square().sum().backward()
        said = [str(entry.message) for entry in caught if "weight_decay" in str(entry.message)]
        results.append(
            (
                "no mode" if mode is None else mode.name,
                before,
                evaluated(model, {"item": torch.arange(4)})["item"],
                said,
            )
        )
    return results


def test_adam_is_decoupled_in_every_mode() -> None:
    """As fbgemm documents it; it has no Adam on a CPU, so the reference is torch's AdamW."""
    for name, before, after, said in run_on_ranks(1, adam)[0]:
        parameter = torch.nn.Parameter(before.clone())
        optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=DECAY)
        for _ in range(3):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(after, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert len(said) == (name in ("NONE", "L2")), (name, said)


def changed_later(rank: int, world_size: int) -> tuple[float, bool]:
    fused_params = {"weight_decay_mode": WeightDecayMode.DECOUPLE}
    model = model_of("rowwise_adagrad", fused_params, True)
    plain = trained(model_of("rowwise_adagrad", {}, True))["dynamic"]
    model.fused_optimizer.update_hyper_parameters({"weight_decay": DECAY})
    after = trained(model)
    return worst_error(after), torch.equal(after["dynamic"], plain)


def test_a_number_that_is_set_later_is_applied_as_the_mode_says() -> None:
    ((error, same),) = run_on_ranks(1, changed_later)
    assert error < tolerances.TRAINED_ROW_RTOL and not same
